"""Loads of one name at once: of those that may not replace anything, the first wins, and no other leaves a trace."""

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.adapter import AdapterRef
from lora.errors import NameTaken
from lora.format.companions import Companions, Vocabulary
from tests.chance import examples
from tests.lora.store_rig import StoreRig

WAIT_S = 30
loads = st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=2, max_size=6)


def outcomes_of(rig: StoreRig, given_loads: list[tuple[int, bool]]) -> list[AdapterRef | None]:
    """What each load came to, None for a refusal; all of them read their folders at the same time."""
    barrier = threading.Barrier(len(given_loads))

    def meet(companions: Companions, vocabulary: Vocabulary) -> None:
        barrier.wait(WAIT_S)

    def load(seed: int, replaces: bool) -> AdapterRef | None:
        try:
            return rig.store.registry.load("poet", folders[seed], replaces)
        except NameTaken:
            return None

    folders = {seed: rig.folder(seed) for seed, _ in given_loads}
    rig.store.check_companions(meet)
    with ThreadPoolExecutor(len(given_loads)) as pool:
        return [future.result(WAIT_S) for future in [pool.submit(load, *each) for each in given_loads]]


@pytest.mark.slow
@settings(max_examples=examples(25))
@given(loads)
def test_one_load_at_most_gets_a_name_that_is_not_to_be_replaced(
    given_loads: list[tuple[int, bool]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rig = StoreRig(Path(folder), 3, disk=False)
        outcomes = outcomes_of(rig, given_loads)
        first = [
            ref for ref, (_, replaces) in zip(outcomes, given_loads, strict=True) if not replaces and ref
        ]
        replacing = [replaces for _, replaces in given_loads if replaces]
        assert len(first) <= 1
        if not replacing:
            assert [rig.store.registry.known("poet")] == first
        assert all(
            ref is not None for ref, (_, replaces) in zip(outcomes, given_loads, strict=True) if replaces
        )
        assert rig.store.registry.known("poet") in outcomes
        rig.store.registry.unload("poet")
        rig.store.ready()
        rig.store.acquire(()).release()
        assert rig.store.ready() == frozenset()
