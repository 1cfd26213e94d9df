"""Hold what an operator allows of adapters that are not in folders of this machine: which URLs, how much, how long."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from engine.config.option import Option, check_fields
from engine.config.option_types import SECONDS, SIZE, SOURCE, TEMPLATE, operator_source
from engine.errors import InvalidConfig
from lora.sources.allowed_sources import AllowedSources
from lora.sources.source_folders import SourceOptions
from lora.sources.source_url import SourceUrl

_MOST_TIMEOUT_S = 240.0
_FETCHED_FOLDER = "fetched"


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Where adapters may be fetched from. Without `prefixes` and `template`, from what `loras` names alone."""

    prefixes: Annotated[
        tuple[str, ...],
        Option(
            "adapters", SOURCE, "adapters may be loaded by URL from here and below", "lora-source", many=True
        ),
    ] = ()
    template: Annotated[
        str | None,
        Option(
            "adapters",
            TEMPLATE,
            "where an adapter is looked for whose name is not known",
            "lora-source-template",
        ),
    ] = None
    most_bytes: Annotated[
        int,
        Option(
            "adapters", SIZE, "most bytes of the weights that are fetched or sent", "lora-source-max-bytes"
        ),
    ] = 4 << 30
    timeout_s: Annotated[
        float, Option("adapters", SECONDS, "how long one adapter may take to come", "lora-source-timeout-s")
    ] = 200.0
    absent_s: Annotated[
        float,
        Option(
            "adapters",
            SECONDS,
            "how long a name that was not found is not looked for",
            "lora-source-absent-s",
        ),
    ] = 60.0
    kept_bytes: Annotated[
        int,
        Option(
            "adapters", SIZE, "most bytes of fetched files that are kept", "lora-source-kept-bytes",
            note="below --adapter-cache-dir, or for this process alone",
        ),
    ] = 16 << 30  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.timeout_s <= _MOST_TIMEOUT_S:
            remedy = f"requests wait 300 s at most: give more than 0, and {_MOST_TIMEOUT_S:g} at most"
            raise InvalidConfig("lora_source_timeout_s", self.timeout_s, remedy)

    def allowed(self, named: Iterable[str | Path] = ()) -> AllowedSources:
        """Return what may be fetched: also what the operator `named` by URL."""
        sources = map(operator_source, named)
        urls = (source for source in sources if isinstance(source, SourceUrl))
        return AllowedSources.of(self.prefixes, self.template, urls)

    def options(self, cache: Path | None, named: Iterable[str | Path] = ()) -> SourceOptions:
        """Return what the adapters' store is to do; fetched files lie in the adapters' `cache`, if there is one."""
        return SourceOptions(
            self.allowed(named), self.most_bytes, self.timeout_s, self.absent_s,
            None if cache is None else cache / _FETCHED_FOLDER, self.kept_bytes,
        )  # fmt: skip
