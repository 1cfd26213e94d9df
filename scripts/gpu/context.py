"""What all sections share: the device, the sizes, the time that is left, and what was measured once for all."""

import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from scripts.gpu.backends.base import DeviceBackends, Run
from scripts.gpu.finding import Finding, failed, skipped
from scripts.gpu.sizes import CheckSizes

T = TypeVar("T")


class CheckContext:
    """`backends` at `sizes`, until `clock` (seconds) says that `limit_s` have passed."""

    def __init__(
        self,
        backends: DeviceBackends,
        sizes: CheckSizes,
        clock: Callable[[], float],
        limit_s: float,
        seed: int,
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
        """Whether the device is a CPU, so that times mean nothing."""
        return self.device.type != "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until the limit."""
        return self._ends_s - self._clock()

    def once(self, make: Callable[["CheckContext"], T]) -> T:
        """Give what `make(context)` made when it was first asked for."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw fresh random numbers on the device, of standard deviation 1."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def median_ms(self, run: Run, count: int) -> float:
        """Time `count` runs after two that warm up; return the median."""
        self.backends.times_ms(run, 2)
        return median(self.backends.times_ms(run, count))

    def try_finding(self, name: str, make: Callable[[], Finding]) -> Iterator[Finding]:
        """Yield the finding, or a failed one, so that one fault hides nothing.

        Nothing is begun after the limit.
        """
        if self.left_s <= 0:
            yield skipped(name, "no time is left")
            return
        try:
            finding = make()
            self.backends.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
            finding = failed(name, error)
        yield finding

    def guarded(self, name: str, found: Iterator[Finding]) -> Iterator[Finding]:
        """Yield the findings, and a failed one if getting them raised."""
        try:
            yield from found
        except Exception as error:  # noqa: BLE001 - as in try_finding
            traceback.print_exception(error)
            yield failed(name, error)

    @cached_property
    def copy_bytes_per_s(self) -> float:
        """Bytes/s that a large copy on the device reads and writes."""
        count = self.sizes.copy_bytes // 4
        pairs = [(self.normal(count), torch.empty(count, device=self.device)) for _ in range(2)]
        turn = iter(range(1 << 30))

        def run() -> None:
            source, target = pairs[next(turn) % 2]
            target.copy_(source)

        return 2e3 * self.sizes.copy_bytes / self.median_ms(run, 10)


def relative_error(found: Tensor, want: Tensor) -> float:
    """Compute ‖found − want‖ / ‖want‖ of the worst row, in float64, so that one wrong row among many shows.

    It is NaN where any of `found` is, and infinite where the shapes differ.
    """
    if found.shape != want.shape:
        return float("inf")
    wide, found = _in_rows(want), _in_rows(found)
    off, size = (torch.sqrt(torch.sum(each.square(), dim=1)) for each in (found - wide, wide))
    return float(torch.max(off / size.clamp(min=1e-30)))


def _in_rows(values: Tensor) -> Tensor:
    return values.double().reshape(len(values) if values.dim() > 1 else 1, -1)
