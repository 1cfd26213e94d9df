"""Where a resident adapter's matrices lie, as a small table on the device: built once when it is first used, kept as
long as the adapter's weights are held by anyone, and read by every kernel.

    table: [layers, groups, RECORD] int64
    record: address of A, address of its rows' scales, rows of A,
            then for each of up to three sites: address of Bt, its first row of A, its rank
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lora.segments import AdapterWeights, GroupWeights
from lora.target_modules import BaseShape, SiteGroup

SITE_WORDS = 3
RECORD = 3 + 3 * SITE_WORDS
GROUPS = tuple(SiteGroup)


@dataclass(frozen=True, slots=True)
class Table:
    """An adapter's records on the device, and its most rows of A at any layer, by group."""

    records: Tensor
    ranks: tuple[int, ...]

    @property
    def address(self) -> int:
        """Of the first record."""
        return self.records.data_ptr()


class Tables:
    """The tables of the adapters that fit `base` and have weights of `dtype` on `device`."""

    def __init__(self, base: BaseShape, dtype: torch.dtype, device: torch.device) -> None:
        self._base, self._dtype, self._device = base, dtype, device
        self._tables: WeakKeyDictionary[AdapterWeights, Table] = WeakKeyDictionary()
        self.of_base = self._table(self._empty())

    def __len__(self) -> int:
        return len(self._tables)

    def of(self, adapter: AdapterWeights) -> Table:
        """The adapter's table. Raises ValueError where its dtype or device is not this op's."""
        table = self._tables.get(adapter)
        if table is None:
            self._check(adapter)
            table = self._tables[adapter] = self._table(self._records(adapter))
        return table

    def _check(self, adapter: AdapterWeights) -> None:
        for weights in adapter.groups.values():
            found = weights.A.dtype, weights.A.device.type
            if found != (self._dtype, self._device.type):
                raise ValueError(
                    f"adapter {adapter.digest[:12]} has weights of {found[0]} on {found[1]}: this op reads"
                    f" {self._dtype} on {self._device.type}; keep adapters in one dtype and in device pages"
                )

    def _table(self, records: np.ndarray) -> Table:
        ranks = tuple(int(rank) for rank in records[:, :, 2].max(axis=0, initial=0))
        words = torch.from_numpy(records)
        if self._device.type == "cuda":  # or the host would wait for the steps that are under way
            words = words.pin_memory()
        return Table(words.to(self._device, non_blocking=True), ranks)

    def _empty(self) -> np.ndarray:
        return np.zeros((self._base.num_layers, len(GROUPS), RECORD), dtype=np.int64)

    def _records(self, adapter: AdapterWeights) -> np.ndarray:
        records = self._empty()
        for (layer, group), weights in adapter.groups.items():
            records[layer, GROUPS.index(group)] = self._record(group, weights)
        return records

    def _record(self, group: SiteGroup, weights: GroupWeights) -> np.ndarray:
        record = np.zeros(RECORD, dtype=np.int64)
        record[:3] = weights.A.data_ptr(), weights.scale.data_ptr(), weights.A.shape[0]
        widths = [self._base.of(site).out_features for site in group.sites]
        starts = [sum(widths[:number]) for number in range(len(widths))]
        for part in weights.parts:
            at = 3 + SITE_WORDS * starts.index(part.out_start)
            record[at : at + SITE_WORDS] = (
                part.Bt.data_ptr(),
                part.rank_start,
                part.rank_stop - part.rank_start,
            )
        return record
