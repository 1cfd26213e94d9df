"""The LoRA arithmetic on a GPU: two kernels per group, shrink and expand, whose cost follows each row's own adapter.

A step's work is written on the host when the batch's membership changes (see work) and sent in one copy to fixed
memory; each launch then has the same arguments and the same grid, filled once and dealing out whatever work the words
describe.

So a step may be captured in a CUDA graph: `load` the step's table outside, and capture `plan` and what it gives
inside. `plan` of a table that is loaded copies nothing. Before each replay `load` that step's table. A graph is
good for one number of rows, one `Tiling` (see `tiling_of`) and one `generation`.

Adapters may be wider than the model: products are then in the adapters' dtype. h is float32.
"""

# Triton's kernels have no types.
# pyright: reportUnknownVariableType=false

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.ops.triton.device import DTYPES, SentWords, launch, multiprocessors
from lora.ops.triton.expand import add_expanded
from lora.ops.triton.shrink import shrink, shrink_tokens
from lora.ops.triton.tables import RECORD, Tables
from lora.ops.triton.work import GROUPS, Rows, Work, plan_work
from lora.segments import NO_SEGMENTS, SegmentTable
from lora.target_modules import BaseShape, SiteGroup

DECODE_ROWS = (
    256  # the rows of the widest step that is captured, and of a step shaped for many adapters of few rows
)
_MOST_SPLITS = 8
_REGISTERS = 64 * 1024  # of a multiprocessor
_PLANE_STEP = 1024  # elements of h: planes of any size begin alike, or kernels would be compiled anew
_LEAST_DEPTH = 512  # of one split: 16 rows of A are then 16 KiB in bfloat16, which keeps a block busy


@dataclass(frozen=True, slots=True)
class Tiling:
    """The sizes of the kernels' tiles; `programs` is blocks per multiprocessor."""

    block_rows: int  # rows of a chunk; chunks of one row never meet a tensor core
    shrink_rank: int  # rows of A of an item
    shrink_depth: int
    row_depth: int  # as shrink_depth, for a chunk of one row
    expand_rank: int
    columns: int
    splits: int  # of the depth, at most
    warps: int
    programs: int

    @property
    def launch_options(self) -> dict[str, int]:
        """Triton's own: the compiler is given as many registers as leave room for all blocks at once."""
        share = _REGISTERS // (32 * self.warps * self.programs) // 8 * 8
        return {"num_warps": self.warps, "maxnreg": min(share, 255)}


DISTINCT = Tiling(1, 16, 128, 256, 16, 128, splits=8, warps=4, programs=6)
SHARED = Tiling(16, 16, 128, 256, 16, 128, splits=8, warps=4, programs=4)
PREFILL = Tiling(64, 64, 64, 64, 16, 64, splits=4, warps=4, programs=2)


@dataclass(frozen=True, slots=True)
class Expansion:
    """What a kernel that consumes y + B h takes of the step, besides its own arguments."""

    h: Tensor  # [_MOST_SPLITS * plane] float32
    words: Tensor
    record_at: int  # of the layer and group, in an adapter's table
    plane: int
    splits: int
    adapted: bool  # whether any row has an adapter


class TritonLora:
    """LoraOp on `device`, over adapters of `dtype` that fit `base`; one step at a time."""

    def __init__(self, base: BaseShape, dtype: torch.dtype, device: torch.device) -> None:
        self.base, self.dtype, self.device = base, dtype, device
        self.multiprocessors = multiprocessors(device)
        self._tables = Tables(base, dtype, device)
        self._loaded: tuple[SegmentTable, int] = (NO_SEGMENTS, -1)
        self._words = SentWords(1 << 14, device)
        self.h = torch.empty(_MOST_SPLITS << 16, dtype=torch.float32, device=device)
        self.work = plan_work((), 0, 0, 1, 1)
        self._regrown = 0

    @property
    def generation(self) -> int:
        """Changes when memory that launches refer to has moved: graphs captured before are then void."""
        return self._words.generation + self._regrown

    @property
    def words(self) -> Tensor:
        """The loaded step's work, on the device."""
        return self._words.on_device

    @property
    def resident_tables(self) -> int:
        """Adapters that the device has a table of."""
        return len(self._tables)

    def plan(self, table: SegmentTable) -> "TritonStep":
        """See LoraOp."""
        return self.plan_rows(table, table.segments[-1].stop if table.segments else 0)

    def plan_rows(self, table: SegmentTable, rows: int) -> "TritonStep":
        """As `plan`, of a batch of `rows` rows, whose consumers visit those of the base too."""
        self.load(table, rows)
        return TritonStep(self, tiling_of(table, rows), bool(table.segments))

    def load(self, table: SegmentTable, rows: int) -> None:
        """Lay out the step's work and send it, unless it is there. Raises ValueError for an adapter whose dtype or
        device is not the op's."""
        if (table, rows) == self._loaded:
            return
        tiling = tiling_of(table, rows)
        adapted: list[Rows] = []
        for segment in table.segments:
            own = self._tables.of(segment.adapter)
            adapted.append(Rows(segment.start, segment.stop, own.address, own.ranks))
        base = self._tables.of_base.address
        self.work = plan_work(adapted, rows, base, tiling.block_rows, tiling.shrink_rank)
        self._words.send(self.work.words)
        self._fit(self.work)
        self._loaded = table, rows

    def splits(self, group: SiteGroup, tiling: Tiling) -> int:
        """Into how many parts the group's depth is cut; of the model alone in a decode shape, and of the number of
        items in a prefill shape, where planes cost more than idle multiprocessors. Columns of A are not split."""
        splits = 1 if group is SiteGroup.EMBEDDING else tiling.splits
        depth = self.base.of(group.sites[0]).in_features
        if tiling is PREFILL:
            wanted = 2 * self.multiprocessors
            while splits > 1 and splits * len(self.work.items(group)) > wanted:
                splits //= 2
        while splits > 1 and depth < splits * _LEAST_DEPTH:
            splits //= 2
        return splits

    def _fit(self, work: Work) -> None:
        if _MOST_SPLITS * work.h_elements > self.h.numel():
            plane = -(-2 * work.h_elements // _PLANE_STEP) * _PLANE_STEP
            self.h = torch.empty(_MOST_SPLITS * plane, dtype=torch.float32, device=self.device)
            self._regrown += 1
            assert self.h.numel() < 1 << 31, "the kernels count elements of h in 32 bits"


def tiling_of(table: SegmentTable, rows: int) -> Tiling:
    """The shape of a step of `rows` rows. Any shape computes any step; this is the one that suits it."""
    if rows > DECODE_ROWS:
        return PREFILL
    return DISTINCT if rows < 2 * len(table.segments) else SHARED


@dataclass(frozen=True, slots=True)
class TritonStep:
    """LoraStep over the work that is loaded."""

    op: TritonLora
    tiling: Tiling
    adapted: bool

    @property
    def programs(self) -> int:
        """The grid of every launch: it fills the device once, whatever the work."""
        return self.op.multiprocessors * self.tiling.programs

    def add_lora(self, y: Tensor, x: Tensor, layer: int, group: SiteGroup) -> None:
        """As LoraStep.add_lora; y is float32 or narrower, and each sum is rounded to it once."""
        if self.adapted:
            self.shrink(x, layer, group)
            self._add(y, None, layer, group)

    def add(self, y: Tensor, residual: Tensor | None, layer: int, group: SiteGroup) -> None:
        """Add B h, plus `residual`, to y in place, for every row of the batch, after `shrink`."""
        if self.adapted or residual is not None:
            self._add(y, residual, layer, group)

    def shrink(self, x: Tensor, layer: int, group: SiteGroup) -> None:
        """Compute h = scale * (A x) for every row with an adapter, on the current stream."""
        if not self.adapted:
            return
        tiling, given = self.tiling, self.expansion(layer, group)
        where = GROUPS.index(group), given.record_at, self.op.base.of(group.sites[0]).in_features
        constants: dict[str, object] = {
            "DTYPE": DTYPES[self.op.dtype],
            "BLOCK_ROWS": tiling.block_rows,
            "BLOCK_RANK": tiling.shrink_rank,
            **tiling.launch_options,
        }
        if group is SiteGroup.EMBEDDING:
            launch(shrink_tokens, self.programs, given.h, x, given.words, *where, **constants)
            return
        launch(
            shrink,
            self.programs,
            *(given.h, x, given.words, *where, given.plane),
            SPLITS=given.splits,
            BLOCK_DEPTH=tiling.shrink_depth,
            ROW_DEPTH=tiling.row_depth,
            **constants,
        )

    def expansion(self, layer: int, group: SiteGroup) -> Expansion:
        """What a fused consumer of the group's projection needs."""
        op = self.op
        record_at = (layer * len(GROUPS) + GROUPS.index(group)) * RECORD
        splits = op.splits(group, self.tiling)
        return Expansion(op.h, op.words, record_at, op.h.numel() // _MOST_SPLITS, splits, self.adapted)

    def _add(self, y: Tensor, residual: Tensor | None, layer: int, group: SiteGroup) -> None:
        tiling, given = self.tiling, self.expansion(layer, group)
        widths = [self.op.base.of(site).out_features for site in group.sites]
        launch(
            add_expanded,
            self.programs,
            y,
            y if residual is None else residual,
            given.h,
            given.words,
            given.record_at,
            given.plane,
            *widths,
            *[0] * (3 - len(widths)),
            DTYPE=DTYPES[self.op.dtype],
            SPLITS=given.splits,
            ALL_ROWS=residual is not None,
            HAS_RESIDUAL=residual is not None,
            ADAPTED=self.adapted,
            BLOCK_ROWS=tiling.block_rows,
            BLOCK_RANK=tiling.expand_rank,
            BLOCK_COLUMNS=tiling.columns,
            **tiling.launch_options,
        )
