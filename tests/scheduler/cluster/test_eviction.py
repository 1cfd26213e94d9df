"""Who goes first when a node's cache is full."""

from scheduler.cluster.eviction import CheapestEviction, LruEviction, Usage
from tests.scheduler.cluster.lossy import adapter


def _used(name: str, rank: int, times: list[float]) -> Usage:
    usage = Usage(adapter(name, rank))
    for now in times:
        usage.use(now)
    return usage


OFTEN = _used("often", 8, [float(at) for at in range(50)])
LATELY = _used("lately", 8, [90.0])
LARGE = _used("large", 128, [90.0, 91.0])


def test_the_longest_unused_goes_first() -> None:
    order = LruEviction().order([LARGE, OFTEN, LATELY], 100.0)
    assert [usage.ref.name for usage in order] == ["often", "lately", "large"]


def test_what_costs_least_to_have_again_by_byte_goes_first_though_used_last() -> None:
    order = CheapestEviction().order([OFTEN, LATELY, LARGE], 100.0)
    assert [usage.ref.name for usage in order] == ["large", "lately", "often"]


def test_popularity_halves_in_a_minute() -> None:
    usage = _used("a", 8, [0.0, 0.0])
    assert usage.popularity(60.0) == 1.0
    assert usage.popularity(120.0) == 0.5


def test_a_small_adapter_outlasts_a_large_one_of_the_same_popularity_where_latency_counts() -> None:
    small, large = _used("small", 8, [0.0]), _used("large", 128, [0.0])
    order = CheapestEviction(latency_s=0.1).order([small, large], 1.0)
    assert [usage.ref.name for usage in order] == ["large", "small"]
