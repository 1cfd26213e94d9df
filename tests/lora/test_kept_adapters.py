"""What a coordinator wants kept stays known, comes back when there is room, and is told of when it comes and goes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora.adapter import AdapterRef
from lora.errors import UnknownAdapter
from tests.lora.store_rig import PAGE_BYTES, PAGES_OF_RANK_4, StoreRig


class Told:
    """What was told, in order."""

    def __init__(self, rig: StoreRig) -> None:
        self.news: list[tuple[str, str]] = []
        rig.store.kept.tell(
            lambda ref: self.news.append(("arrived", ref.name)),
            lambda ref: self.news.append(("displaced", ref.name)),
            lambda ref, error: self.news.append(("failed", ref.name)),
        )


def test_what_is_kept_outlives_its_name_until_it_is_dropped(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(2)
    told, ref = Told(s), s.load(1)
    s.store.kept.keep(ref)
    s.store.kept.keep(ref)
    s.store.registry.unload("a1")
    s.store.retain(ref)
    s.store.release(ref)
    s.store.kept.drop(ref)
    s.store.kept.drop(ref)
    s.store.ready()
    s.store.acquire(()).release()
    with pytest.raises(UnknownAdapter):
        s.store.retain(ref)
    with pytest.raises(UnknownAdapter):
        s.store.kept.keep(ref)
    assert told.news == [("arrived", "a1")]
    assert ref.digest not in s.store.kept.tiers()


def test_what_gave_way_to_a_request_comes_back_when_there_is_room(
    make_rig: Callable[[int], StoreRig],
) -> None:
    s = make_rig(1)
    told, kept, asked = Told(s), s.load(1), s.load(2)
    s.store.kept.keep(kept)
    s.store.retain(asked)
    s.store.loader.prefetch((asked,))
    assert s.store.ready() == {asked.digest}
    s.store.acquire(()).release()
    assert s.store.kept.tiers()[kept.digest] == "elsewhere"
    s.store.release(asked)
    s.store.registry.unload("a2")
    s.store.ready()
    s.store.acquire(()).release()
    s.store.kept.look()
    assert s.store.kept.tiers()[kept.digest] == "device"
    assert told.news == [("arrived", "a1"), ("displaced", "a1"), ("arrived", "a1")]


def test_room_is_what_is_free_or_nobody_s(make_rig: Callable[[int], StoreRig]) -> None:
    s, one = make_rig(3), PAGES_OF_RANK_4 * PAGE_BYTES
    refs: list[AdapterRef] = [s.load(seed) for seed in (1, 2)]
    assert s.store.kept.room_bytes() == 3 * one
    s.store.kept.keep(refs[0])
    assert s.store.kept.room_bytes() == 2 * one
    s.store.retain(refs[1])
    assert s.store.kept.room_bytes() == one
    s.store.release(refs[1])
    s.store.kept.drop(refs[0])
    assert s.store.kept.room_bytes() == 3 * one


def test_a_content_is_learnt_from_the_node_s_own_folder_and_no_other_content_in_its_place(
    make_rig: Callable[[int], StoreRig], tmp_path: Path
) -> None:
    s = make_rig(2)
    s.store.registry.declare("mine", s.folder(1))
    ref = s.store.registry.resolve("mine")
    s.store.kept.learn(ref, "mine", ())
    other = AdapterRef("0" * 64, "mine", 4, (), 1)
    for unknown in (other, AdapterRef("1" * 64, "nobody", 4, (), 1)):
        with pytest.raises(UnknownAdapter):
            s.store.kept.learn(unknown, unknown.name, ())


def test_a_load_that_fails_is_told_and_not_tried_again_until_it_is_ordered_anew(
    make_rig: Callable[[int], StoreRig],
) -> None:
    s = make_rig(1)
    told, kept, asked = Told(s), s.load(1), s.load(2)
    s.store.kept.keep(kept)
    s.step(kept)
    s.store.retain(asked)
    s.store.loader.prefetch((asked,))
    s.step(asked)
    for file in (s.root / "cache").glob(f"{kept.digest}*"):
        file.unlink()
    shutil.rmtree(s.root / "adapter-1")
    s.store.release(asked)
    s.store.registry.unload("a2")
    s.store.ready()
    s.store.acquire(()).release()
    for _ in range(3):
        s.store.kept.look()
    assert told.news == [("arrived", "a1"), ("displaced", "a1"), ("failed", "a1")]
    with pytest.raises(UnknownAdapter):
        s.store.kept.keep(kept)
    again = s.load(1)
    s.store.kept.keep(again)
    assert told.news[3:] == [("arrived", "a1")]
