"""Let an engine know the adapters that its configuration names, finds and brings, each under a name of its own.

What an operator named must be served, or the engine does not start. What was only found is passed over with a warning.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from lora.errors import AdapterRefused
from lora.sources.source_url import AdapterSource, SourceUrl
from lora.store.folder_watch import FolderWatch
from lora.store.registry import AdapterRegistry


def add_adapters(
    registry: AdapterRegistry,
    named: Mapping[str, AdapterSource],
    lora_dir: Path | None,
    embedded: Mapping[str, Path],
) -> FolderWatch | None:
    """Declare all adapters, then load those that were named. Raises AdapterRefused for one of these.

    A name given explicitly wins over one that was found, and that over the embedded model's own. All names are known
    before the first weights are read: peers ask from the start on. Return the watch over `lora_dir`, not started.
    """
    _add_named(registry.declare, named)
    watch = FolderWatch(registry, lora_dir) if lora_dir else None
    if watch is not None:
        watch.take_all()
    for name, folder in embedded.items():
        registry.declare(name, folder, replaces=False)
    _add_named(registry.load, named)
    return watch


def _add_named(add: Callable[[str, AdapterSource], object], named: Mapping[str, AdapterSource]) -> None:
    for name, source in named.items():
        shown = source.shown if isinstance(source, SourceUrl) else source
        try:
            add(name, source)
        except AdapterRefused as refusal:
            raise type(refusal)(name, f"{refusal.reason} (in {shown})", refusal.may_pass) from refusal
