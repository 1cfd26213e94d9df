"""What a client may have read: files below a root, whoever exchanges files and folders for links meanwhile."""

import os
import threading
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch

from lora.errors import AdapterLost, AdapterRefused
from lora.format import allowed_roots
from lora.format.adapter_files import WEIGHTS_FILE, PassingFlaw, read_regular_file
from lora.format.allowed_roots import AdapterFolder, AllowedRoots
from lora.format.companions import read_companions, read_vocabulary
from lora.format.peft_config import CONFIG_FILE
from lora.store.tiers import SourceTier
from tests.chance import examples
from tests.lora.store_rig import BASE_SHAPE, StoreRig
from tests.oracles.adapters import write_adapter

WAIT_S = 60
TEMPLATE = "chat_template.jinja"
FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    TEMPLATE,
    "tokenizer_config.json",
    "tokenizer.json",
    "generation_config.json",
)
Swap = Callable[[], None]


class Tree:
    """A root with the adapters `honest` and `swapped` below it, and `secret` outside, which is never to be read."""

    def __init__(self, at: Path) -> None:
        self.root, self.secret = at / "root", at / "secret"
        self.swapped = self.root / "tenant" / "swapped"
        for seed, folder in enumerate((self.root / "honest", self.swapped, self.secret / "swapped")):
            write_adapter(folder, BASE_SHAPE, 4, seed)
            for file in FILES[2:]:
                (folder / file).write_text("{}")
        self.roots = AllowedRoots.below([self.root])
        self.stolen: list[str] = []

    def swaps(self) -> dict[str, tuple[Path, Path]]:
        """What is exchanged for a link, and where the link leads."""
        files = {file: (self.swapped / file, self.secret / "swapped" / file) for file in FILES}
        folders = {
            "folder": (self.swapped, self.secret / "swapped"),
            "parent": (self.swapped.parent, self.secret),
        }
        return files | folders

    def exchange(self, name: str) -> Swap:
        """Put a link in place of something; return what puts it back."""
        path, outside = self.swaps()[name]
        aside = path.with_name(f"{path.name}.aside")
        path.rename(aside)
        path.symlink_to(outside)

        def back() -> None:
            path.unlink()
            aside.rename(path)

        return back


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    """A tree, and at the end the proof that no byte was read from outside."""
    tree = Tree(tmp_path)
    outside = {path.stat().st_ino: path for path in tree.secret.rglob("*")}
    readv = os.readv

    def watched(descriptor: int, buffers: list[memoryview]) -> int:
        if (secret := outside.get(os.fstat(descriptor).st_ino)) is not None:
            tree.stolen.append(secret.name)
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", watched)
    yield tree
    assert not tree.stolen


@pytest.mark.parametrize("name", [*FILES, "folder", "parent"])
def test_what_becomes_a_link_after_it_was_followed_is_not_read(
    name: str, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = allowed_roots._walk
    file = tree.swapped / (name if name in FILES else CONFIG_FILE)

    def swapped(root: Path, parts: tuple[str, ...]) -> int:
        tree.exchange(name)
        return walk(root, parts)

    monkeypatch.setattr(allowed_roots, "_walk", swapped)
    with pytest.raises(PassingFlaw, match=f"{file.name} leads outside"):
        read_regular_file(file, 1 << 20, tree.roots)


@pytest.mark.parametrize("name", [*FILES, "folder", "parent"])
def test_no_link_leads_a_read_outside_at_a_load_or_ever_after(name: str, tree: Tree, tmp_path: Path) -> None:
    store = StoreRig(tmp_path, 3).store
    loaded = store.registry.load("held", tree.swapped, roots=tree.roots)
    source = SourceTier(BASE_SHAPE, torch.float32)
    source.remember(loaded.digest, "held", AdapterFolder(tree.swapped, tree.roots))
    back = tree.exchange(name)
    with pytest.raises(AdapterRefused, match="leads outside"):
        store.registry.load("new", tree.swapped, roots=tree.roots)
    stamp = source.stamp("held", AdapterFolder(tree.swapped))
    with pytest.raises(AdapterRefused, match="leads outside"):
        store.registry.follow("held", tree.swapped, stamp)
    if name in (CONFIG_FILE, WEIGHTS_FILE, "folder", "parent"):
        with pytest.raises(AdapterLost, match="leads outside"):
            source.fetch(loaded.digest, torch.zeros(loaded.nbytes, dtype=torch.uint8))
    back()
    assert store.registry.load("new", tree.swapped, roots=tree.roots) == loaded


def test_while_links_come_and_go_nothing_outside_is_read_and_honest_folders_load(
    tree: Tree, tmp_path: Path
) -> None:
    store, ended = StoreRig(tmp_path, 3).store, threading.Event()

    def exchange() -> None:
        for name in cycle(tree.swaps()):
            if ended.is_set():
                return
            tree.exchange(name)()

    honest = store.registry.load("honest", tree.root / "honest", roots=tree.roots)
    own = store.registry.load("swapped", tree.swapped, roots=tree.roots)
    swapper = threading.Thread(target=exchange, daemon=True)
    swapper.start()
    loads = refusals = 0
    try:
        for _ in range(examples(150)):
            assert store.registry.load("honest", tree.root / "honest", roots=tree.roots) == honest
            try:
                assert store.registry.load("swapped", tree.swapped, roots=tree.roots) == own
                loads += 1
            except AdapterRefused:
                refusals += 1
    finally:
        ended.set()
        swapper.join(WAIT_S)
    assert refusals, "nothing was exchanged while it was read"
    assert store.registry.load("swapped", tree.swapped, roots=tree.roots) == own


def test_links_below_a_root_are_followed(tree: Tree) -> None:
    blobs = tree.root / "blobs"
    blobs.mkdir()
    for number, file in enumerate(FILES):
        (tree.swapped / file).rename(blobs / str(number))
        (tree.swapped / file).symlink_to(Path("../../blobs") / str(number))
    (tree.root / "current").symlink_to("tenant/swapped")
    for folder in (tree.swapped, tree.root / "current"):
        assert read_companions(folder, tree.roots).chat_template == "{}"
        assert read_vocabulary(folder, tree.roots).tokenizer == b"{}"


def test_links_that_lead_to_themselves_are_refused(tree: Tree) -> None:
    (tree.swapped / TEMPLATE).unlink()
    (tree.swapped / TEMPLATE).symlink_to(TEMPLATE)
    with pytest.raises(ValueError, match=f"{TEMPLATE} cannot be read"):
        read_regular_file(tree.swapped / TEMPLATE, 9, tree.roots)
