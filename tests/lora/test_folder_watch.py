"""A folder of adapters is followed as it changes: taken when it is still, never served half-written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora.errors import UnknownAdapter
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.allowed_roots import AdapterFolder
from lora.format.peft_config import CONFIG_FILE
from lora.store.folder_watch import FolderWatch
from lora.store.tier_chain import TierChain
from tests.lora.store_rig import StoreRig


class Watched:
    """A store, a folder of adapters, and the watch over it, which only scans when told to."""

    def __init__(self, rig: StoreRig, folder: Path) -> None:
        self.rig, self.folder = rig, folder
        folder.mkdir()
        self.registry = rig.store.registry
        self.registry.reserve(("base",))
        self.watch = FolderWatch(self.registry, folder)

    def put(self, name: str, seed: int) -> Path:
        """Write an adapter's folder elsewhere and copy it here, file by file."""
        to = self.folder / name
        to.mkdir(exist_ok=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copy(self.rig.folder(seed) / file, to / file)
        return to

    def scan(self, times: int = 2) -> tuple[str, ...]:
        for _ in range(times):
            self.watch.scan()
        return self.registry.names()


@pytest.fixture
def watched(make_rig: Callable[[int], StoreRig], tmp_path: Path) -> Watched:
    return Watched(make_rig(3), tmp_path / "watched")


def test_a_new_folder_is_taken_up_when_it_is_still(watched: Watched) -> None:
    watched.watch.take_all()
    watched.put("poet", 1)
    assert watched.scan(1) == ()
    assert watched.scan(1) == ("poet",)
    assert watched.registry.resolve("poet").rank == 4


def test_a_folder_that_is_half_written_is_not_taken(watched: Watched) -> None:
    folder = watched.put("poet", 1)
    (folder / WEIGHTS_FILE).rename(folder / "part")
    assert watched.scan(3) == ()
    for size in (10, 20, 30):
        (folder / WEIGHTS_FILE).write_bytes(b"x" * size)
        assert watched.scan(1) == ()
    (folder / "part").rename(folder / WEIGHTS_FILE)
    assert watched.scan() == ("poet",)


def test_a_change_is_served_whole_and_the_old_content_until_then(watched: Watched) -> None:
    watched.put("poet", 1)
    watched.watch.take_all()
    old = watched.registry.resolve("poet")
    watched.rig.store.retain(old)
    watched.put("poet", 2)
    watched.scan(1)
    assert watched.registry.known("poet") == old
    watched.scan(1)
    new = watched.registry.known("poet")
    assert new not in (None, old)
    assert {old.digest, new.digest} <= watched.rig.store.ready() if new else False
    watched.rig.store.release(old)


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_broken_change_keeps_the_old_content_and_is_said_once(
    watched: Watched, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    folder = watched.put("poet", 1)
    watched.watch.take_all()
    old = watched.registry.resolve("poet")
    (folder / file).write_bytes(b"torn")
    watched.scan(5)
    assert watched.registry.known("poet") == old
    assert caplog.text.count("keeps its content") == 1
    watched.put("poet", 2)
    watched.scan()
    assert watched.registry.known("poet") not in (None, old)


def test_a_change_before_the_first_use_is_read_then(watched: Watched) -> None:
    watched.put("poet", 1)
    watched.watch.take_all()
    watched.put("poet", 2)
    watched.scan()
    expected = watched.rig.load(2, "other")
    assert watched.registry.resolve("poet") == expected


def test_a_folder_that_is_gone_is_unloaded_and_running_requests_keep_its_content(watched: Watched) -> None:
    folder = watched.put("poet", 1)
    watched.watch.take_all()
    ref = watched.registry.resolve("poet")
    watched.rig.store.retain(ref)
    shutil.rmtree(folder)
    assert watched.scan(1) == ("poet",)
    assert watched.scan(1) == ()
    with pytest.raises(UnknownAdapter):
        watched.registry.resolve("poet")
    assert ref.digest in watched.rig.store.ready()
    watched.rig.store.release(ref)
    watched.put("poet", 1)
    assert watched.scan() == ("poet",)


def test_a_link_that_comes_to_lead_elsewhere_is_a_change(watched: Watched, tmp_path: Path) -> None:
    for release, seed in (("first", 1), ("second", 2)):
        (tmp_path / release).mkdir()
        shutil.copytree(watched.rig.folder(seed), tmp_path / release / "poet")
    data = watched.folder / "..data"
    data.symlink_to(tmp_path / "first")
    (watched.folder / "poet").symlink_to(Path("..data") / "poet")
    watched.watch.take_all()
    old = watched.registry.resolve("poet")
    data.with_name("..new").symlink_to(tmp_path / "second")
    data.with_name("..new").rename(data)
    assert watched.scan() == ("poet",)
    assert watched.registry.known("poet") not in (None, old)


def test_the_watched_folder_itself_may_be_a_link(make_rig: Callable[[int], StoreRig], tmp_path: Path) -> None:
    rig = make_rig(2)
    for release, seed in (("first", 1), ("second", 2)):
        shutil.copytree(rig.folder(seed), tmp_path / release / "poet")
    current = tmp_path / "current"
    current.symlink_to("first")
    watch = FolderWatch(rig.store.registry, current)
    watch.take_all()
    old = rig.store.registry.resolve("poet")
    current.unlink()
    current.symlink_to("second")
    watch.scan()
    watch.scan()
    assert rig.store.registry.known("poet") not in (None, old)


def test_names_from_elsewhere_are_left_alone_and_that_is_said_once(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    own = watched.rig.load(1, "poet")
    watched.watch.take_all()
    watched.put("poet", 2)
    watched.put("base", 2)
    watched.put("a b", 2)
    assert watched.scan(4) == ("poet",)
    assert watched.registry.known("poet") == own
    assert caplog.text.count("is passed over") == 3
    shutil.rmtree(watched.folder / "poet")
    assert watched.scan() == ("poet",)


def test_an_unloaded_name_stays_unloaded_until_its_folder_changes(watched: Watched) -> None:
    watched.put("poet", 1)
    watched.watch.take_all()
    watched.registry.unload("poet")
    assert watched.scan(3) == ()
    watched.put("poet", 2)
    assert watched.scan() == ("poet",)


def test_hidden_folders_are_no_adapters(watched: Watched) -> None:
    watched.put(".poet", 1)
    watched.watch.take_all()
    assert watched.scan() == ()
    (watched.folder / ".poet").rename(watched.folder / "poet")
    assert watched.scan() == ("poet",)


def test_a_folder_that_cannot_be_listed_changes_nothing(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.put("poet", 1)
    watched.watch.take_all()
    watched.folder.rename(watched.folder.with_name("away"))
    assert watched.scan(4) == ("poet",)
    assert caplog.text.count("its adapters stay") == 1


def test_a_broken_folder_is_read_again_only_when_it_has_changed(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = watched.put("poet", 1)
    (folder / WEIGHTS_FILE).write_bytes(b"torn")
    watched.watch.take_all()
    reads: list[str] = []
    pack = TierChain.pack

    def counted(tiers: TierChain, name: str, folder: AdapterFolder, most_bytes: int):  # noqa: ANN202 - as it is there
        reads.append(name)
        return pack(tiers, name, folder, most_bytes)

    monkeypatch.setattr(TierChain, "pack", counted)
    for _ in range(3):
        with pytest.raises(ValueError, match="truncated") as refusal:
            watched.registry.resolve("poet")
        assert str(folder) not in str(refusal.value)
        watched.scan(1)
    assert reads == ["poet"]
    assert "truncated" in (watched.registry.entries()[0].refusal or "")
    watched.put("poet", 1)
    assert watched.registry.resolve("poet").rank == 4
    assert watched.registry.entries()[0].refusal is None


def test_a_name_that_is_asked_for_is_taken_up_at_once(watched: Watched) -> None:
    watched.watch.take_all()
    watched.registry.found.look_in(watched.watch)
    watched.put("poet", 1)
    assert watched.registry.resolve("poet").rank == 4
    assert watched.scan() == ("poet",)
    shutil.rmtree(watched.folder / "poet")
    assert watched.scan() == ()
    with pytest.raises(UnknownAdapter):
        watched.registry.resolve("poet")


def test_what_is_no_whole_folder_of_its_own_name_is_not_taken_up_for_a_request(watched: Watched) -> None:
    watched.watch.take_all()
    watched.registry.found.look_in(watched.watch)
    (watched.put("part", 1) / WEIGHTS_FILE).unlink()
    watched.put(".hidden", 1)
    watched.put("base", 1)
    (watched.folder / "deep").mkdir()
    watched.put("deep/poet", 1)
    for name in ("part", ".hidden", "base", "deep/poet", "../watched/part", "none", ""):
        with pytest.raises(UnknownAdapter):
            watched.registry.resolve(name)
    assert watched.registry.names() == ()


def test_an_unloaded_name_is_not_taken_up_again_for_a_request(watched: Watched) -> None:
    watched.watch.take_all()
    watched.registry.found.look_in(watched.watch)
    watched.put("poet", 1)
    watched.registry.resolve("poet")
    watched.put("poet", 2)
    watched.scan()
    watched.registry.unload("poet")
    assert watched.scan(3) == ()
    with pytest.raises(UnknownAdapter):
        watched.registry.resolve("poet")


def test_a_folder_that_comes_while_others_are_looked_at_stays(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.watch.take_all()
    watched.registry.found.look_in(watched.watch)
    look = watched.watch._look

    def come_afterwards() -> object:
        seen = look()
        watched.put("poet", 1)
        watched.registry.resolve("poet")
        return seen

    monkeypatch.setattr(watched.watch, "_look", come_afterwards)
    assert watched.scan(1) == ("poet",)
    monkeypatch.undo()
    assert watched.scan() == ("poet",)
