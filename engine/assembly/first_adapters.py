"""Let an engine know the adapters that its configuration names, finds and brings, each under a name of its own.

What an operator named must be served, or the engine does not start. What was only found is passed over with a warning.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora.errors import AdapterRefused
from lora.format.peft_config import CONFIG_FILE
from lora.store.registry import AdapterRegistry

_log = logging.getLogger(__name__)


def add_adapters(
    registry: AdapterRegistry, named: Mapping[str, Path], lora_dir: Path | None, embedded: Mapping[str, Path]
) -> None:
    """Declare all adapters, then load those that were named. Raises AdapterRefused for one of these.

    A name given explicitly wins over one that was found, and that over the embedded model's own. All names are known
    before the first weights are read: peers ask from the start on.
    """
    for name, folder in embedded.items():
        if name not in named:
            registry.declare(name, folder)
    for name, folder in _found(lora_dir):
        if name in named:
            if not folder.samefile(named[name]):
                _log.warning("%s is passed over: the name is given to %s", folder, named[name])
            continue
        try:
            registry.declare(name, folder)
        except AdapterRefused as refusal:
            _log.warning("%s is passed over: %s", folder, refusal)
    for add in (registry.declare, registry.load):
        for name, folder in named.items():
            try:
                add(name, folder)
            except AdapterRefused as refusal:
                raise type(refusal)(name, f"{refusal.reason} (in {folder})") from refusal


def _found(lora_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """Find every PEFT folder directly below `lora_dir`, by its name."""
    for path in sorted(lora_dir.glob(f"*/{CONFIG_FILE}")) if lora_dir else ():
        yield path.parent.name, path.parent
