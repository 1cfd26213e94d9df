"""Tests of adapters that are fetched over HTTP: from good servers, and from all others."""

import logging
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from aiohttp import web

from lora.errors import AdapterRefused, SourceAbsent, UnknownAdapter
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.peft_config import CONFIG_FILE
from lora.sources.allowed_sources import AllowedSources
from lora.sources.source_folders import SourceOptions
from lora.sources.source_url import SourceUrl
from tests.lora.sources.source_server import (
    SourceServer,
    cut_after,
    endless,
    redirect,
    source_server,
    status,
    trickle,
)
from tests.lora.store_rig import BASE_SHAPE, StoreRig
from tests.oracles.adapters import write_adapter

WEIGHTS = f"/one/{WEIGHTS_FILE}"


@pytest.fixture
def server(tmp_path: Path) -> Generator[SourceServer]:
    with source_server(tmp_path / "served") as running:
        write_adapter(running.root / "one", BASE_SHAPE, 4, 1)
        yield running


def make_rig(
    tmp_path: Path, server: SourceServer, *, template: bool = False, prefix: str = "", **options: object
) -> StoreRig:
    allowed = AllowedSources.of([prefix or server.url], f"{server.url}/{{name}}" if template else None)
    sources = SourceOptions(allowed, folder=tmp_path / "fetched", **options)  # pyright: ignore[reportArgumentType]
    return StoreRig(tmp_path, 4, sources=sources)


def load(rig: StoreRig, server: SourceServer, folder: str = "one", name: str = "a") -> str:
    return rig.store.registry.load(name, SourceUrl.parse(f"{server.url}/{folder}")).digest


def local_digest(rig: StoreRig) -> str:
    return rig.load(1, "local").digest


def test_an_adapter_is_served_from_a_url(tmp_path: Path, server: SourceServer) -> None:
    rig = make_rig(tmp_path, server)
    assert load(rig, server) == local_digest(rig)
    assert rig.store.registry.source("a") == f"{server.url}/one"


def test_only_what_is_read_is_asked_for(tmp_path: Path, server: SourceServer) -> None:
    (server.root / "one" / "optimizer.pt").write_bytes(b"x")
    load(make_rig(tmp_path, server), server)
    assert len({path for path, _ in server.asked}) == 7
    assert not any("optimizer" in path for path, _ in server.asked)


def test_a_download_that_is_cut_goes_on_where_it_was(tmp_path: Path, server: SourceServer) -> None:
    server.faults[WEIGHTS] = cut_after(server, 1000, times=2)
    rig = make_rig(tmp_path, server)
    assert load(rig, server) == local_digest(rig)
    assert server.ranges_of(WEIGHTS) == [None, "bytes=1000-", "bytes=2000-"]


def test_a_later_load_goes_on_where_an_earlier_one_ended(tmp_path: Path, server: SourceServer) -> None:
    down = cut_after(server, 0, times=100)
    first = cut_after(server, 1000)
    server.faults[WEIGHTS] = first
    calls = 0

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        return await (first if calls == 1 else down)(request, content)

    server.faults[WEIGHTS] = answer
    with pytest.raises(AdapterRefused, match="try again, what came is kept") as refusal:
        load(make_rig(tmp_path, server), server)
    assert refusal.value.may_pass
    server.faults.clear()
    server.asked.clear()
    rig = make_rig(tmp_path, server)
    assert load(rig, server) == local_digest(rig)
    assert server.ranges_of(WEIGHTS) == ["bytes=1000-"]


@pytest.mark.parametrize("lacks", ["has_ranges", "has_versions"])
def test_a_server_that_cannot_go_on_begins_anew(tmp_path: Path, server: SourceServer, lacks: str) -> None:
    setattr(server, lacks, False)
    server.faults[WEIGHTS] = cut_after(server, 1000)
    rig = make_rig(tmp_path, server)
    assert load(rig, server) == local_digest(rig)


def test_a_part_of_another_version_is_not_gone_on_with(tmp_path: Path, server: SourceServer) -> None:
    cut = cut_after(server, 1000)

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        response = await cut(request, content)
        write_adapter(server.root / "one", BASE_SHAPE, 4, 2)
        return response

    server.faults[WEIGHTS] = answer
    rig = make_rig(tmp_path, server)
    assert load(rig, server) == rig.load(2, "local").digest


@pytest.mark.parametrize("told", [None, 1 << 40, 1 << 23])
def test_what_is_too_large_is_refused_before_it_is_read_or_while(
    tmp_path: Path, server: SourceServer, told: int | None
) -> None:
    server.faults[WEIGHTS] = endless(told)
    with pytest.raises(AdapterRefused, match=r"at most 4194304 are fetched") as refusal:
        load(make_rig(tmp_path, server, most_bytes=4 << 20), server)
    assert not refusal.value.may_pass
    assert (tmp_path / "fetched").is_dir()
    assert sum(path.stat().st_size for path in tmp_path.glob("fetched/*/*")) <= 5 << 20


def test_a_file_that_tells_two_sizes_is_refused(tmp_path: Path, server: SourceServer) -> None:
    cut = cut_after(server, 1000)

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        response = await cut(request, content)
        if response.status == 206:
            response.headers["Content-Range"] = f"bytes 1000-{len(content) - 1}/{len(content) + 7}"
        return response

    server.faults[WEIGHTS] = answer
    with pytest.raises(AdapterRefused, match="bytes by its source"):
        load(make_rig(tmp_path, server), server)


def test_another_part_than_was_asked_for_is_refused(tmp_path: Path, server: SourceServer) -> None:
    cut = cut_after(server, 1000)

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        response = await cut(request, content)
        if response.status == 206:
            response.headers["Content-Range"] = f"bytes 0-{len(content) - 1001}/{len(content)}"
        return response

    server.faults[WEIGHTS] = answer
    with pytest.raises(AdapterRefused, match="another part of the file"):
        load(make_rig(tmp_path, server), server)


def test_a_slow_server_is_given_up_in_time(tmp_path: Path, server: SourceServer) -> None:
    server.faults[WEIGHTS] = trickle()
    with pytest.raises(AdapterRefused, match="not fetched in time") as refusal:
        load(make_rig(tmp_path, server, timeout_s=0.3), server)
    assert refusal.value.may_pass


def test_a_redirect_is_followed_to_what_is_allowed_only(tmp_path: Path, server: SourceServer) -> None:
    write_adapter(server.root / "outside" / "one", BASE_SHAPE, 4, 1)
    (server.root / "outside" / "one").rename(server.root / "two")
    server.faults[WEIGHTS] = redirect(f"/two/{WEIGHTS_FILE}")
    with pytest.raises(AdapterRefused, match="outside of what --lora-source allows") as refusal:
        load(make_rig(tmp_path, server, prefix=f"{server.url}/one"), server)
    assert not refusal.value.may_pass
    assert f"/two/{WEIGHTS_FILE}" not in dict(server.asked)
    rig = make_rig(tmp_path, server)
    assert load(rig, server) == local_digest(rig)


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://host/a",
        "gopher://host",
        "http://user:hunter2@127.0.0.1/x",
        "//evil.org/x",
    ],
)
def test_a_redirect_never_leaves_http(tmp_path: Path, server: SourceServer, target: str) -> None:
    server.faults[WEIGHTS] = redirect(target)
    with pytest.raises(AdapterRefused) as refusal:
        load(make_rig(tmp_path, server), server)
    assert "hunter2" not in str(refusal.value)


def test_a_redirect_in_a_circle_ends(tmp_path: Path, server: SourceServer) -> None:
    server.faults[WEIGHTS] = redirect(WEIGHTS)
    with pytest.raises(AdapterRefused):
        load(make_rig(tmp_path, server), server)


@pytest.mark.parametrize(
    ("code", "may_pass"), [(401, False), (403, False), (418, False), (500, True), (503, True)]
)
def test_a_status_says_whether_it_may_pass(
    tmp_path: Path, server: SourceServer, code: int, may_pass: bool
) -> None:
    server.faults[WEIGHTS] = status(code)
    with pytest.raises(AdapterRefused) as refusal:
        load(make_rig(tmp_path, server, timeout_s=5.0), server)
    assert refusal.value.may_pass is may_pass


def test_what_is_not_there_is_absent(tmp_path: Path, server: SourceServer) -> None:
    with pytest.raises(SourceAbsent, match=CONFIG_FILE):
        load(make_rig(tmp_path, server), server, "nowhere")
    (server.root / "one" / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterRefused, match=WEIGHTS_FILE):
        load(make_rig(tmp_path, server), server)


def test_companions_that_may_not_be_read_count_as_absent(tmp_path: Path, server: SourceServer) -> None:
    server.faults["/one/tokenizer_config.json"] = status(403)
    rig = make_rig(tmp_path, server)
    assert load(rig, server) == local_digest(rig)


def test_a_server_that_is_away_may_pass(tmp_path: Path, server: SourceServer) -> None:
    server.url = "http://127.0.0.1:1"
    with pytest.raises(AdapterRefused) as refusal:
        load(make_rig(tmp_path, server), server)
    assert refusal.value.may_pass


def test_a_url_that_is_not_allowed_is_not_asked(tmp_path: Path, server: SourceServer) -> None:
    with pytest.raises(AdapterRefused, match="--lora-source"):
        load(make_rig(tmp_path, server, prefix=f"{server.url}/on"), server)
    assert not server.asked


def test_a_new_load_takes_what_the_source_has_now(tmp_path: Path, server: SourceServer) -> None:
    rig = make_rig(tmp_path, server)
    load(rig, server)
    write_adapter(server.root / "one", BASE_SHAPE, 4, 2)
    assert load(rig, server) == rig.load(2, "local").digest


def test_what_has_not_changed_is_not_sent_again(tmp_path: Path, server: SourceServer) -> None:
    sent: list[int] = []

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        response = server.plain(request, content)
        sent.append(response.status)
        return response

    server.faults[WEIGHTS] = answer
    rig = make_rig(tmp_path, server)
    load(rig, server)
    load(make_rig(tmp_path, server), server)  # another process with the same folder
    assert sent == [200, 304]


def test_a_content_is_learnt_by_its_digest_from_where_its_name_was_registered(
    tmp_path: Path, server: SourceServer
) -> None:
    url = SourceUrl.parse(f"{server.url}/one")
    ref = make_rig(tmp_path, server).store.registry.load("a", url)
    other = make_rig(tmp_path, server).store
    other.kept.fetch(ref, url)
    assert other.contents.layout(ref.digest) is not None
    assert other.registry.names() == ()
    write_adapter(server.root / "one", BASE_SHAPE, 4, 2)
    with pytest.raises(AdapterRefused, match="another content"):
        make_rig(tmp_path, server).store.kept.fetch(ref, url)


def test_a_content_that_nobody_kept_is_fetched_again(tmp_path: Path, server: SourceServer) -> None:
    rig = make_rig(tmp_path, server)
    store, first = rig.store, rig.store.registry.load("a", SourceUrl.parse(f"{server.url}/one"))
    others = [rig.load(seed) for seed in range(2, 8)]  # more than there is room for on the device
    for ref in (*others, first):
        if ref == first:
            assert first.digest not in store.ready()
            for path in (*tmp_path.glob("cache/*"), *tmp_path.glob("fetched/*/*")):
                path.unlink()
            server.asked.clear()
        store.retain(ref)
        store.loader.prefetch([ref])
        rig.step(ref)
        store.release(ref)
    assert WEIGHTS in dict(server.asked)


def test_an_unknown_name_is_looked_for_by_the_template_once(tmp_path: Path, server: SourceServer) -> None:
    rig = make_rig(tmp_path, server, template=True)
    registry = rig.store.registry
    assert registry.resolve("one").digest == local_digest(rig)
    for _ in range(3):
        with pytest.raises(UnknownAdapter):
            registry.resolve("nowhere")
    assert [path for path, _ in server.asked].count(f"/nowhere/{CONFIG_FILE}") == 1


def test_an_absent_name_is_looked_for_again_after_a_while(tmp_path: Path, server: SourceServer) -> None:
    rig = make_rig(tmp_path, server, template=True, absent_s=0.0)
    with pytest.raises(UnknownAdapter):
        rig.store.registry.resolve("two")
    write_adapter(server.root / "two", BASE_SHAPE, 4, 2)
    assert rig.store.registry.resolve("two").digest == rig.load(2, "local").digest


def test_what_was_found_and_cannot_be_served_is_not_fetched_for_every_request(
    tmp_path: Path, server: SourceServer
) -> None:
    (server.root / "one" / CONFIG_FILE).write_text("{}")
    rig = make_rig(tmp_path, server, template=True)
    for _ in range(3):
        with pytest.raises(AdapterRefused):
            rig.store.registry.resolve("one")
    assert [path for path, _ in server.asked].count(f"/one/{CONFIG_FILE}") == 1


def test_a_reserved_name_is_not_looked_for(tmp_path: Path, server: SourceServer) -> None:
    rig = make_rig(tmp_path, server, template=True)
    rig.store.registry.reserve(["one"])
    with pytest.raises(UnknownAdapter):
        rig.store.registry.resolve("one")
    assert not server.asked


def test_fetched_files_are_bounded(tmp_path: Path, server: SourceServer) -> None:
    for number in range(5):
        write_adapter(server.root / f"n{number}", BASE_SHAPE, 4, number)
    size = (server.root / "one" / WEIGHTS_FILE).stat().st_size
    rig = make_rig(tmp_path, server, kept_bytes=int(2.5 * size))
    for number in range(5):
        load(rig, server, f"n{number}", f"n{number}")
    assert len(list((tmp_path / "fetched").iterdir())) == 2


def test_two_processes_fetch_one_adapter_one_after_the_other(tmp_path: Path, server: SourceServer) -> None:
    rigs = [make_rig(tmp_path, server), make_rig(tmp_path, server)]
    expected = local_digest(rigs[0])
    found: list[str] = []
    threads = [threading.Thread(target=lambda rig=rig: found.append(load(rig, server))) for rig in rigs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [expected, expected]


def test_a_signature_is_in_no_log_and_no_error(
    tmp_path: Path, server: SourceServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "lora")
    rig = make_rig(tmp_path, server)
    server.faults[WEIGHTS] = status(418)
    with pytest.raises(AdapterRefused) as refusal:
        load(rig, server, "one?sig=secret")
    assert "secret" not in f"{refusal.value} {caplog.text}"


def test_files_of_this_machine_are_read_from_below_their_prefix_only(tmp_path: Path) -> None:
    write_adapter(tmp_path / "in" / "one", BASE_SHAPE, 4, 1)
    write_adapter(tmp_path / "out" / "one", BASE_SHAPE, 4, 1)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out" / "one")
    allowed = AllowedSources.of([f"file://{tmp_path}/in"])
    rig = StoreRig(tmp_path, 4, sources=SourceOptions(allowed))
    registry = rig.store.registry
    assert registry.load("a", SourceUrl.parse(f"file://{tmp_path}/in/one")).digest == local_digest(rig)
    for folder in ("in/link", "out/one"):
        with pytest.raises(AdapterRefused):
            registry.load("b", SourceUrl.parse(f"file://{tmp_path}/{folder}"))
