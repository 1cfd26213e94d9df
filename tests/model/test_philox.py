"""The generator's published vectors, and what the draws made of it must satisfy."""

import numpy as np
import pytest

from model.sampling.philox import philox, uniforms

# From the known-answer file of the generator's authors (Random123, philox4x32 with 10 rounds).
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[np.ndarray]:
    return [np.array([int(word, 16)], dtype=np.uint64) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert [int(word[0]) for word in philox((c0, c1, c2, c3), (k0, k1))] == [
        int(w, 16) for w in expected.split()
    ]


def test_a_draw_is_a_function_of_its_own_coordinates() -> None:
    together = uniforms([5, 6, 5, 2**63, -1], [0, 0, 1, 2, 3], [9, 9, 9, 10, 11])
    for i, coordinates in enumerate([(5, 0, 9), (6, 0, 9), (5, 1, 9), (2**63, 2, 10), (-1, 3, 11)]):
        assert uniforms(*([value] for value in coordinates))[0] == together[i]
    assert len(set(together)) == 5


def test_every_coordinate_changes_the_draw_and_draws_are_uniform() -> None:
    count = 20_000
    zeros, counting = [0] * count, list(range(count))
    for coordinates in ((counting, zeros, zeros), (zeros, counting, zeros), (zeros, zeros, counting)):
        drawn = uniforms(*coordinates)
        assert 0 < drawn.min() < drawn.max() < 1
        histogram, _ = np.histogram(drawn, bins=50, range=(0, 1))
        chi_square = ((histogram - count / 50) ** 2 / (count / 50)).sum()
        assert chi_square < 85  # 99.9 % of a chi-square with 49 degrees of freedom
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
