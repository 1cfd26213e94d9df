"""SegmentTable: which rows of a step's batch belong to which adapter. Base rows are in no segment and cost nothing."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from lora.target_modules import SiteGroup


@dataclass(frozen=True, slots=True)
class SitePart:
    """One site's share of a fused group: rows `rank_start:rank_stop` of A, columns `out_start:out_stop` of y."""

    rank_start: int
    rank_stop: int
    out_start: int
    out_stop: int
    Bt: Tensor  # [r, out_features], B transposed, a view into the packed form


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """An adapter's weights at one (layer, group), as views into its packed form.

    `A` is [R, in_features] with the group's sites stacked (R = sum of their ranks). `scale` is [R] float32:
    alpha / r, or alpha / sqrt(r) with rsLoRA, repeated over each site's rows.
    """

    A: Tensor
    scale: Tensor
    parts: tuple[SitePart, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AdapterWeights:
    """A resident adapter: its weights by (layer, group); an absent key means that the adapter skips that group.

    The layer of groups outside the layers is 0.

    Equal only to itself, since the same content may lie elsewhere after it was evicted and has come back.
    """

    digest: str
    groups: Mapping[tuple[int, SiteGroup], GroupWeights]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:stop` of the step's batch run under `adapter`."""

    start: int
    stop: int
    adapter: AdapterWeights


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """The step's segments: disjoint, ascending, one per distinct adapter."""

    segments: tuple[Segment, ...]

    def adapts(self, group: SiteGroup) -> bool:
        """Return whether any of the adapters changes `group`, which is outside the layers."""
        return any((0, group) in segment.adapter.groups for segment in self.segments)

    def of_rows(self, rows: Sequence[int]) -> "SegmentTable":
        """Return the table of some of the rows, which ascend, as a batch of their own."""
        edges = (
            (bisect_left(rows, each.start), bisect_left(rows, each.stop), each.adapter)
            for each in self.segments
        )
        return SegmentTable(tuple(Segment(*edge) for edge in edges if edge[0] < edge[1]))


NO_SEGMENTS = SegmentTable(segments=())


class AdapterLease:
    """Adapters pinned for a step: `weights` by digest, valid until `release`."""

    def __init__(self, weights: Mapping[str, AdapterWeights], release: Callable[[], None]) -> None:
        self.weights = weights
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let the adapters go; a second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> "AdapterLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
