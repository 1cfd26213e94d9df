"""Draw on a CUDA device without a wait: parameters go down in one pinned copy, tokens come back in another.

What lies between can be captured in a graph. The tokens are those of `model.sampling.sample` for the same logits.
"""

# A launch takes options besides the kernel's arguments.
# pyright: reportCallIssue=false, reportUnknownVariableType=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from model.sampling.draw_kernel import draw_tokens
from model.sampling.masks import keep_allowed
from model.sampling.rows import ROW, edits_of, pack_rows
from model.sampling.sample import SampleRow

_TILE = 4096
_FEW = 4096  # likeliest tokens among which a filter's edge is looked for before the whole row is gone through


@dataclass(frozen=True, slots=True)
class Fetched:
    """Tokens on their way to the host: [2, rows] int64, tokens and whether they mean anything."""

    host: Tensor
    arrived: torch.cuda.Event | None

    @property
    def done(self) -> bool:
        """Whether `tokens` returns without waiting."""
        return self.arrived is None or self.arrived.query()

    def tokens(self) -> tuple[list[int], list[int]]:
        """Waits for them. The rows' tokens, and the rows whose logits were NaN or infinite, or left no token to
        choose, whose tokens mean nothing."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens, sound = cast(list[list[int]], self.host.tolist())
        return tokens, [row for row, fine in enumerate(sound) if not fine]


class DeviceSampler:
    """Draws for up to `rows` rows, from buffers that never move. Per step: `refill` if a row's parameters are not the
    last step's, `adjust` if any row has penalties, biases or bans, `draw`, `fetch`."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._device = device
        self._parameters = torch.zeros(rows, ROW.itemsize, dtype=torch.uint8, device=device)
        self._drawn = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._few = torch.empty(rows, _FEW, dtype=torch.float32, device=device)
        self._few_tokens = torch.empty(rows, _FEW, dtype=torch.int32, device=device)

    @property
    def tokens(self) -> Tensor:
        """Tokens on the device, [rows] int64: what the last `draw` drew, for the next step to read there."""
        return self._drawn[0]

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """All that draws depend on and change, to be restored after a rehearsal."""
        return self._parameters.clone(), self._drawn.clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Be as when the snapshot was taken."""
        self._parameters.copy_(state[0])
        self._drawn.copy_(state[1])

    def refill(self, rows: Sequence[SampleRow]) -> None:
        """Set the parameters of the first len(rows) rows."""
        packed = torch.from_numpy(pack_rows(rows).view(np.uint8).reshape(len(rows), ROW.itemsize))
        self._parameters[: len(rows)].copy_(self._pinned(packed), non_blocking=True)

    def adjust(self, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        """Apply the rows' penalties, biases, bans and masks to logits [L, vocab] float32, in place."""
        edits = edits_of(rows)
        if len(edits):
            _apply(logits, self._sent(edits.places), self._sent(edits.values))
        keep_allowed(logits, rows)

    def draw(self, logits: Tensor, advance: bool = False) -> Tensor:
        """Draw a token for each row of logits [L, vocab]; returns [L] int64, a view of `tokens`. Launches one kernel
        and nothing else. With `advance`, each row's next draw is for the position after."""
        rows, vocab = logits.shape
        assert rows <= len(self._parameters), f"{rows} rows in a sampler for {len(self._parameters)}"
        flat = self._parameters.view(-1)
        views = (flat.view(dtype) for dtype in (torch.float32, torch.int32, torch.float64, torch.int64))
        draw_tokens[(rows,)](
            logits, logits.stride(0), vocab, *views, self._drawn[0], self._drawn[1], self._few, self._few_tokens,
            TILE=min(_TILE, 1 << (vocab - 1).bit_length()),
            FEW=_FEW,
            ADVANCE=advance,
            num_warps=16,
        )  # fmt: skip
        return self._drawn[0, :rows]

    def fetch(self, rows: int) -> Fetched:
        """Start the first `rows` rows' tokens on their way to the host."""
        drawn = self._drawn[:, :rows]
        if self._device.type != "cuda":
            return Fetched(drawn.clone(), None)
        host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
        host.copy_(drawn, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Fetched(host, arrived)

    def _sent(self, values: np.ndarray) -> Tensor:
        return self._pinned(torch.from_numpy(values)).to(self._device, non_blocking=True)

    def _pinned(self, values: Tensor) -> Tensor:
        return values.pin_memory() if self._device.type == "cuda" else values


def _apply(logits: Tensor, places: Tensor, values: Tensor) -> None:
    row, token = places
    repetition, penalty, bias = values
    found = logits[row, token]
    found = torch.where(found > 0, found / repetition, found * repetition) + penalty + bias
    logits[row, token] = found
