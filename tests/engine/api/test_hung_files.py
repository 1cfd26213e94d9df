"""Files that do not answer: they cost what waits for them, and nothing else."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.api.adapters import AdapterAdmin
from engine.async_engine import AsyncEngine
from engine.metrics.telemetry import Telemetry
from tests.engine.api.session import ApiSession, Response, session
from tests.engine.rig import build
from tests.oracles.adapters import base_shape, write_adapter

HUNG = 6
ENOUGH_S = 30


class HungFolders:
    """Folders whose files nobody can open until `mend` is called."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = [f"hung{number}" for number in range(HUNG)]
        for name in self.names:
            write_adapter(root / name, base_shape(), 8, seed=1)
        self.opened = threading.Semaphore(0)
        self.mended = threading.Event()
        self._open = os.open
        monkeypatch.setattr(os, "open", self._wait)

    def mend(self) -> None:
        self.mended.set()

    def _wait(self, path: Any, *arguments: Any, **keywords: Any) -> int:
        if "hung" in str(path):
            self.opened.release()
            self.mended.wait(ENOUGH_S)
        return self._open(path, *arguments, **keywords)


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HungFolders]:
    folders = HungFolders(tmp_path, monkeypatch)
    yield folders
    folders.mend()


@asynccontextmanager
async def serving(root: Path, read_timeout_s: float = ENOUGH_S) -> AsyncIterator[ApiSession]:
    """An engine of which `low` is resident, `high` is known, and all below `root` may be loaded."""
    engine = AsyncEngine(build(root, read_timeout_s=read_timeout_s).engine, Telemetry(), 64)
    await engine.start()
    try:
        async with session(engine, roots=(root,)) as api:
            assert (await ask(api, "low")).status == 200
            yield api
    finally:
        await engine.close()


async def ask(api: ApiSession, model: str) -> Response:
    return await api.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 2})


async def load(api: ApiSession, name: str) -> Response:
    return await api.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": name})


async def test_folders_that_hang_hold_up_nothing_else(tmp_path: Path, hung: HungFolders) -> None:
    async with serving(tmp_path) as api:
        write_adapter(tmp_path / "sound", base_shape(), 8, seed=3)
        loads = [asyncio.create_task(load(api, name)) for name in hung.names]
        while not hung.opened.acquire(blocking=False):
            await asyncio.sleep(0.01)
        for path in ("/health", "/metrics", "/v1/models", "/version"):
            assert (await api.send("GET", path)).status == 200
        assert (await api.post("/tokenize", {"prompt": "a" * 100_000})).status in (200, 400)
        assert (await ask(api, "low")).status == 200
        assert (await ask(api, "high")).status == 200
        assert (await load(api, "sound")).status == 200
        assert not any(task.done() for task in loads)
        hung.mend()
        assert [(await task).status for task in loads] == [200] * HUNG


async def test_a_load_that_hangs_is_answered_at_its_deadline_and_the_next_one_at_once(
    tmp_path: Path, hung: HungFolders
) -> None:
    async with serving(tmp_path, read_timeout_s=0.2) as api:
        for reason in ("has not answered within 0.2 s", "still does not answer"):
            answers = await asyncio.gather(*(load(api, name) for name in hung.names))
            for answer in answers:
                assert (answer.status, answer.error["code"]) == (503, "adapter_unavailable")
                assert "Retry-After" in answer.headers
                assert reason in answer.error["message"]
        hung.mend()
        while (answer := await load(api, hung.names[0])).status == 503:
            await asyncio.sleep(0.01)
        assert answer.status == 200


async def test_many_that_ask_for_a_name_whose_folder_hangs_cost_one_thread(
    tmp_path: Path, hung: HungFolders
) -> None:
    async with serving(tmp_path) as api:
        store = api.engine._store  # pyright: ignore[reportAttributeAccessIssue]
        for name in hung.names:
            store.registry.declare(name, tmp_path / name)
        asked = [asyncio.create_task(ask(api, hung.names[0])) for _ in range(20)]
        while not hung.opened.acquire(blocking=False):
            await asyncio.sleep(0.01)
        assert (await ask(api, "high")).status == 200
        assert not any(task.done() for task in asked)
        hung.mend()
        assert {(await task).status for task in asked} == {200}


async def test_an_engine_closes_though_files_hang(tmp_path: Path, hung: HungFolders) -> None:
    async with serving(tmp_path) as api:
        task = asyncio.create_task(load(api, hung.names[0]))
        while not hung.opened.acquire(blocking=False):
            await asyncio.sleep(0.01)
        task.cancel()
    assert not hung.mended.is_set(), "closing has waited for nothing that hangs"


async def test_a_path_that_cannot_be_followed_in_time_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = threading.Event()
    monkeypatch.setattr("engine.api.adapters._PATH_S", 0.1)
    monkeypatch.setattr(AdapterAdmin, "_allowed", lambda admin, path: mended.wait(ENOUGH_S))
    async with session(roots=(tmp_path,)) as api:
        answers = await asyncio.gather(*(load(api, f"folder{number}") for number in range(HUNG)))
        assert [answer.status for answer in answers] == [503] * HUNG
        assert (await api.send("GET", "/health")).status == 200
        mended.set()
