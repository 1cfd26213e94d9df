"""Chance by counter: random words as a pure function of who draws and when, so that a draw never depends on
what else is drawn. Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
over numpy arrays.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
"""32-bit words, held in 64 bits so that their products fit."""

_ROUNDS = 10
_LOW = np.uint64(0xFFFF_FFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD251_1F53), np.uint64(0xCD9E_8D57))
_WEYL = (np.uint64(0x9E37_79B9), np.uint64(0xBB67_AE85))


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Four random words for each element of the counters [n] and keys [n]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & _LOW, (first >> _HALF) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: Sequence[int], streams: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Draw [n] float64, one for each (seed, stream, position), strictly between 0 and 1. Seeds count modulo 2**64."""
    seed = np.array([value % 2**64 for value in seeds], dtype=np.uint64)
    stream, position = np.array(streams, dtype=np.uint64), np.array(positions, dtype=np.uint64)
    nothing = np.zeros_like(seed)
    word, _, _, _ = philox((position, stream, nothing, nothing), (seed & _LOW, seed >> _HALF))
    return (word.astype(np.float64) + 0.5) * 2.0**-32
