"""CheckContext: what all sections share: the device, the sizes, the time that is left, and what was measured once for all."""

import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from scripts.gpu.backends.base import Backends, Run
from scripts.gpu.finding import Finding, failed, skipped
from scripts.gpu.sizes import Sizes

T = TypeVar("T")


class CheckContext:
    """`backends` at `sizes`, until `clock` (seconds) says that `limit_s` have passed."""

    def __init__(
        self, backends: Backends, sizes: Sizes, clock: Callable[[], float], limit_s: float, seed: int
    ) -> None:
        self.backends, self.sizes = backends, sizes
        self._clock, self._ends_s = clock, clock() + limit_s
        self._made: dict[Callable[[CheckContext], Any], Any] = {}
        self.generator = torch.Generator(backends.device).manual_seed(seed)

    @property
    def device(self) -> torch.device:
        """Where tensors are."""
        return self.backends.device

    @property
    def is_dry_run(self) -> bool:
        """Whether times mean nothing."""
        return self.device.type != "cuda"

    @property
    def left_s(self) -> float:
        """Until the limit."""
        return self._ends_s - self._clock()

    def once(self, make: Callable[["CheckContext"], T]) -> T:
        """What `make(context)` gave when it was first asked for."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fresh random numbers on the device, of standard deviation 1."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def median_ms(self, run: Run, count: int) -> float:
        """Of `count` runs, after two."""
        self.backends.times_ms(run, 2)
        return median(self.backends.times_ms(run, count))

    def try_finding(self, name: str, make: Callable[[], Finding]) -> Iterator[Finding]:
        """The row, or a failed one: one fault is not to hide what comes after. Nothing is begun after the limit."""
        if self.left_s <= 0:
            yield skipped(name, "no time is left")
            return
        try:
            row = make()
            self.backends.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
            row = failed(name, error)
        yield row

    def guarded(self, name: str, rows: Iterator[Finding]) -> Iterator[Finding]:
        """The rows, and a failed one if getting them raised."""
        try:
            yield from rows
        except Exception as error:  # noqa: BLE001 - as in try_finding
            traceback.print_exception(error)
            yield failed(name, error)

    @cached_property
    def copy_bytes_per_s(self) -> float:
        """Read and written by a large copy on the device."""
        count = self.sizes.copy_bytes // 4
        pairs = [(self.normal(count), torch.empty(count, device=self.device)) for _ in range(2)]
        turn = iter(range(1 << 30))

        def run() -> None:
            source, target = pairs[next(turn) % 2]
            target.copy_(source)

        return 2e3 * self.sizes.copy_bytes / self.median_ms(run, 10)


def relative_error(found: Tensor, want: Tensor) -> float:
    """‖found − want‖ / ‖want‖ of the worst row, in float64, so that one wrong row among many shows; NaN where any of
    found is; infinite where it has another shape."""
    if found.shape != want.shape:
        return float("inf")
    wide, found = torch.atleast_2d(want.double()).flatten(1), torch.atleast_2d(found.double()).flatten(1)
    return float(((found - wide).norm(dim=1) / wide.norm(dim=1).clamp(min=1e-30)).max())
