"""The catalogue's file: what was confirmed is there however the coordinator ended, and one coordinator writes."""

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.catalogue.alias_targets import AliasTarget
from engine.catalogue.base import CatalogueEntry
from engine.catalogue.catalogue_file import CatalogueFile, NotWritten, RegisteredName, Superseded
from engine.errors import InvalidConfig
from lora.adapter import AdapterRef
from lora.format.companions import Companions

NOW_S = 1_800_000_000.0


def registered(name: str, content: int = 1, owner: str = "") -> RegisteredName:
    ref = AdapterRef(f"{content:064x}", name, 16, ("q_proj", "o_proj"), 1 << 20, (content, 5))
    companions = Companions("{{ messages }}", None, (2, 3))
    entry = CatalogueEntry(name, ref, "/adapters/x", companions, "some", 2, "", 7)
    return RegisteredName(entry, owner)


def reopened(path: Path) -> dict[str, RegisteredName]:
    catalogue = CatalogueFile(path, NOW_S)
    try:
        return catalogue.read()
    finally:
        catalogue.close()


def test_names_are_read_again_with_all_that_they_mean(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    catalogue = CatalogueFile(path, NOW_S)
    catalogue.put(registered("tenant/a", 1, "n1"))
    catalogue.put(registered("b", 1))
    catalogue.put(registered("b", 2))
    catalogue.put(registered("c", 3))
    catalogue.remove("c")
    catalogue.close()
    read = reopened(path)
    assert read == {"b": registered("b", 2), "tenant/a": registered("tenant/a", 1, "n1")}
    ref = read["b"].entry.ref
    assert (ref.rank, ref.sites, ref.invocation) == (16, ("q_proj", "o_proj"), (2, 5))


def test_an_alias_means_the_same_content_and_keeps_it_when_the_other_name_moves_on(tmp_path: Path) -> None:
    catalogue = CatalogueFile(None, NOW_S)
    catalogue.put(registered("v1", 1, "n1"))
    catalogue.set_alias("latest", "v1")
    catalogue.put(registered("v1", 2, "n1"))
    latest = catalogue.read()["latest"]
    meant = replace(registered("v1", 1).entry, name="latest", alias_of="v1")
    assert latest.entry == replace(meant, pinned=0, max_requests=0)
    assert (latest.entry.ref.invocation, latest.owner) == ((1, 5), "")
    catalogue.put(RegisteredName(replace(meant, pinned=3)))
    catalogue.set_alias("latest", "v1")
    moved = catalogue.read()["latest"].entry
    assert (moved.ref, moved.pinned, moved.max_requests) == (registered("v1", 2).entry.ref, 3, 7)


def test_the_targets_of_an_alias_are_read_again_until_it_is_made_anew(tmp_path: Path) -> None:
    path, targets = tmp_path / "catalogue", (AliasTarget("v1", 0.9), AliasTarget("v2", 0.1))
    catalogue = CatalogueFile(path, NOW_S)
    catalogue.put(registered("v1", 1))
    catalogue.set_alias("best", "v1", targets)
    catalogue.put(RegisteredName(replace(registered("other").entry, targets=targets)))
    catalogue.close()
    read = reopened(path)
    assert (read["best"].entry.targets, read["best"].entry.alias_of) == (targets, "v1")
    assert (read["other"].entry.targets, read["v1"].entry.targets) == (targets, ())
    catalogue = CatalogueFile(path, NOW_S)
    catalogue.set_alias("best", "v1")
    assert catalogue.read()["best"].entry.targets == ()
    catalogue.close()


FIRST_FORMAT = """
create table settings (key text primary key, value integer not null) without rowid;
create table names (
    name text primary key, digest text not null, content_name text not null, rank integer not null,
    sites text not null, bytes integer not null, root text not null, companions text not null, effect text,
    pinned integer not null, owner text not null
) without rowid;
insert into settings values ('format', 1);
insert into names values ('a', 'ab', 'a', 8, '["q_proj"]', 4096, '/x', '', 'some', 1, 'n1');
"""


def test_a_file_of_the_first_format_is_read_and_written_on(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    with sqlite3.connect(path) as database:
        database.executescript(FIRST_FORMAT)
    database.close()
    (found,) = reopened(path).values()
    assert (found.entry.ref.digest, found.entry.pinned, found.entry.alias_of, found.owner) == (
        "ab",
        1,
        "",
        "n1",
    )
    assert found.entry.ref.invocation == ()
    assert reopened(path) == {"a": found}


def test_a_change_that_the_file_does_not_take_is_told_and_not_made(tmp_path: Path) -> None:
    catalogue = CatalogueFile(tmp_path / "catalogue", NOW_S)
    catalogue._database.execute("pragma query_only = on")
    with pytest.raises(NotWritten, match=r"catalogue.*cannot be written"):
        catalogue.put(registered("a"))
    assert catalogue.read() == {}
    catalogue.close()


def test_epochs_grow_also_where_the_clock_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    epochs: list[int] = []
    for now_s in (NOW_S, NOW_S, 0.0, NOW_S + 100):
        catalogue = CatalogueFile(path, now_s)
        epochs.append(catalogue.epoch)
        catalogue.close()
    assert epochs == sorted(set(epochs))
    assert epochs[-1] << 32 < 1 << 62


def test_whoever_led_before_writes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    old = CatalogueFile(path, NOW_S)
    old.put(registered("a", 1))
    new = CatalogueFile(path, NOW_S)
    for write in (
        lambda: old.put(registered("a", 2)),
        lambda: old.remove("a"),
        lambda: old.set_alias("b", "a"),
        old.check_leads,
    ):
        with pytest.raises(Superseded, match="--registry-file"):
            write()
    new.check_leads()
    assert new.read() == {"a": registered("a", 1)}
    old.close()
    new.close()


def test_a_file_that_is_no_catalogue_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    path.write_bytes(b"something else, and long enough to be no database of any kind" * 20)
    with pytest.raises(InvalidConfig, match=r"registry_file=.*catalogue.*give another file"):
        CatalogueFile(path, NOW_S)
    with pytest.raises(InvalidConfig, match="registry_file"):
        CatalogueFile(tmp_path / "no folder" / "catalogue", NOW_S)


def test_a_damaged_row_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    catalogue = CatalogueFile(path, NOW_S)
    catalogue.put(registered("a"))
    catalogue._database.execute("update names set companions = '{}'")
    with pytest.raises(InvalidConfig, match="registry_file"):
        catalogue.read()
    catalogue.close()


WRITER = """
import sys
from pathlib import Path
from engine.catalogue.catalogue_file import CatalogueFile
from tests.engine.cluster.test_catalogue_file import NOW_S, registered
catalogue = CatalogueFile(Path(sys.argv[1]), NOW_S)
for number in range(100000):
    catalogue.put(registered(f"round{sys.argv[2]}/{number}"))
    print(number, flush=True)
"""


def test_each_confirmed_write_is_there_after_kills_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    confirmed: list[str] = []
    for turn in range(3):
        command = [sys.executable, "-c", WRITER, str(path), str(turn)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(5 + 7 * turn):
                confirmed.append(f"round{turn}/{int(writer.stdout.readline())}")
            os.kill(writer.pid, signal.SIGKILL)
            confirmed += [f"round{turn}/{int(line)}" for line in writer.stdout if line.endswith("\n")]
        assert set(confirmed) <= reopened(path).keys()
