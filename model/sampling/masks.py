"""Exclude the tokens that rows may not draw, whatever their logits. The rows' masks are applied together."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class MaskedRow(Protocol):
    """A row whose draw may be restricted."""

    @property
    def allowed(self) -> NDArray[np.int32] | None:
        """Bits, 32 to a word, lowest first: bit i says whether token i may be drawn. None allows all."""
        ...


def keep_allowed(logits: Tensor, rows: Sequence[MaskedRow]) -> None:
    """Set the logits [L, vocab] of what the rows do not allow to -inf, in place."""
    masks = {i: row.allowed for i, row in enumerate(rows) if row.allowed is not None}
    if not masks:
        return
    packed = np.stack(list(masks.values())).view(np.uint8)
    bits = np.unpackbits(packed, axis=1, count=logits.shape[1], bitorder="little")
    excluded = torch.from_numpy(bits == 0).to(logits.device)  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
    chosen = list(masks)
    if len(chosen) == len(logits):
        logits.masked_fill_(excluded, -math.inf)
    else:
        logits[chosen] = logits[chosen].masked_fill(excluded, -math.inf)
