"""Read the PEFT folders that names are given, and remember of each what was found. Names are the registry's."""

import logging
from pathlib import Path

from lora.errors import AdapterRefused
from lora.format.allowed_roots import AdapterFolder
from lora.format.folder_stamp import FolderStamp
from lora.format.packed import inertia
from lora.format.peft import PackedAdapter
from lora.format.peft_config import CONFIG_FILE
from lora.sources.source_url import shown_source
from lora.store.names.named_adapter import NamedAdapter
from lora.store.tier_chain import TierChain

_log = logging.getLogger(__name__)


def check_is_adapter(name: str, folder: Path) -> None:
    """Raise AdapterRefused unless the folder looks like an adapter's; nothing in it is read."""
    try:
        is_adapter = (folder / CONFIG_FILE).is_file()
    except OSError as error:
        raise AdapterRefused(name, f"its folder cannot be read ({error.strerror})", may_pass=True) from error
    if not is_adapter:
        raise AdapterRefused(name, f"it has no {CONFIG_FILE}: give a folder saved by PEFT")


class FolderReader:
    """Reads folders through the tiers, which keep the packed forms. It has no lock: a folder is its reader's."""

    def __init__(self, tiers: TierChain, most_bytes: int) -> None:
        """Refuse adapters larger than `most_bytes`."""
        self._tiers = tiers
        self._most_bytes = most_bytes

    def stamp(self, name: str, path: Path) -> FolderStamp:
        """Look at a folder without reading it. Raises AdapterRefused, which may pass, if it does not answer."""
        return self._tiers.stamp(name, AdapterFolder(path))

    def read(self, entry: NamedAdapter, folder: AdapterFolder) -> PackedAdapter:
        """Read the folder, unless it is known to be refused as it is, and tell `entry` what was found.

        Raises AdapterRefused.
        """
        stamp = self._tiers.stamp(entry.name, folder)
        entry.check(stamp)
        try:
            entry.companions = self._tiers.companions(entry.name, folder)
            packed = self._tiers.pack(entry.name, folder, self._most_bytes)
        except AdapterRefused as refusal:
            entry.refuse(stamp, refusal)
            _log.warning("%s (in %s)", refusal, shown_source(folder.url) if folder.url else folder.path)
            raise
        entry.accept(stamp, inertia(packed.layout, packed.rows))
        return packed
