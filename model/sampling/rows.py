"""A row's sampling parameters and its penalties as flat arrays, as a device takes them in one copy each."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from model.sampling.sample import COLDEST, SampleRow

ROW = np.dtype(
    [
        ("top_p", "<f8"),
        ("seed", "<u8"),
        ("inverse_temperature", "<f4"),  # 0 is greedy
        ("log_min_p", "<f4"),  # -inf keeps all
        ("top_k", "<i4"),  # the most that int32 holds keeps all
        ("stream", "<u4"),
        ("position", "<u4"),
        ("nothing", "<u4"),
    ]
)
"""One row's parameters, 40 bytes."""

WORDS = ROW.itemsize // 4
DOUBLES = ROW.itemsize // 8


class Double(IntEnum):
    """Where the parameters of eight bytes are, counted in such."""

    TOP_P = 0
    SEED = 1


class Word(IntEnum):
    """Where the parameters of four bytes are, counted in such."""

    INVERSE_TEMPERATURE = 4
    LOG_MIN_P = 5
    TOP_K = 6
    STREAM = 7
    POSITION = 8


_ALL = 2**31 - 1
_WORD = 2**32


def pack_rows(rows: Sequence[SampleRow]) -> NDArray[np.void]:
    """Pack the rows' parameters: [rows] of ROW."""
    return np.array([_packed(row) for row in rows], dtype=ROW)


def _packed(row: SampleRow) -> tuple[float | int, ...]:
    return (
        row.top_p,
        row.seed % 2**64,
        1 / max(row.temperature, COLDEST) if row.temperature > 0 else 0.0,
        math.log(row.min_p) if row.min_p > 0 else -math.inf,
        row.top_k if 0 < row.top_k < _ALL else _ALL,
        row.stream % _WORD,
        row.position % _WORD,
        0,
    )


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes to n single logits, no two of one place. places: [2, n] int64, row and token; values: [3, n] float32,
    repetition, penalty and bias. x becomes (x / repetition if x > 0 else x * repetition) + penalty + bias; a banned
    token's bias is -inf."""

    places: NDArray[np.int64]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return self.places.shape[1]


def edits_of(rows: Sequence[SampleRow]) -> Edits:
    """What the rows' penalties, biases and bans change."""
    changes = [(i, *change) for i, row in enumerate(rows) if row.adjusts for change in _changes(row)]
    table = np.array(changes, dtype=np.float64).reshape(len(changes), 5).T  # exact: tokens are below 2**53
    return Edits(table[:2].astype(np.int64), table[2:].astype(np.float32))


def _changes(row: SampleRow) -> list[tuple[int, float, float, float]]:
    """List (token, repetition, penalty, bias) of every token that the row changes."""
    penalised = row.presence_penalty or row.frequency_penalty
    counts = Counter(row.output_token_ids if penalised else ())
    seen: set[int] = (
        {*row.prompt_token_ids, *row.output_token_ids} if row.repetition_penalty != 1.0 else set()
    )
    bias: dict[int, float] = {}
    for token, value in row.logit_bias:
        bias[token] = bias.get(token, 0.0) + value
    bias |= dict.fromkeys(row.banned_token_ids, -math.inf)
    return [
        (
            token,
            row.repetition_penalty if token in seen else 1.0,
            -(row.presence_penalty + row.frequency_penalty * counts[token]) if token in counts else 0.0,
            bias.get(token, 0.0),
        )
        for token in sorted(seen | counts.keys() | bias.keys())
    ]
