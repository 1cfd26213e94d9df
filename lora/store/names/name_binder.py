"""Let names mean packed contents: each is put where it is used from, and tried, before its name means it."""

from collections.abc import Callable

from lora.format.peft import PackedAdapter
from lora.store.loader import AdapterLoader
from lora.store.names.name_table import NameTable
from lora.store.names.named_adapter import NamedAdapter
from lora.store.names.trial import ContentTrials
from lora.store.tier_chain import TierChain


class NameBinder:
    """Binds names of a table. Any thread may call it; it holds the table's lock only while a name changes."""

    def __init__(
        self, table: NameTable, loader: AdapterLoader, tiers: TierChain, trials: ContentTrials
    ) -> None:
        self._table, self._loader, self._tiers, self._trials = table, loader, tiers, trials
        self._contents = loader.contents

    def bind_packed(
        self,
        entry: NamedAdapter,
        packed: PackedAdapter,
        may_replace: Callable[[NamedAdapter | None], bool],
        tries: bool,
    ) -> bool:
        """Let the entry's name mean the packed content, if that may replace what the name means by now; tell so.

        With `tries` it is tried before. Raises AdapterRefused then, and nothing has changed.
        """
        with self._trials.known(packed.ref, packed.layout, entry.name, entry.folder):
            self._loader.fill(packed)
            if tries:
                self._trials.run(entry, packed.ref, waits=True)
            with self._table.lock:
                if not may_replace(self._table.by_name.get(entry.name)):
                    return False
                self._table.bind(entry, packed.ref, packed.layout)
        self._tiers.trim(self._contents.retained() | {packed.ref.digest})
        self._contents.advance()
        return True
