"""Run a real server of the embedded model in this process, and count what its requests have left behind."""

import asyncio
import shutil
import tempfile
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from engine.assembly.assembly import assemble
from engine.async_engine import AsyncEngine
from engine.config.config import EngineConfig, ServeConfig
from engine.demo.embedded import adapter_folders
from engine.metrics.telemetry import Telemetry
from engine.serve import serve
from scripts.fuzz.case import Finding

T = TypeVar("T")
ANSWER_S = 120.0
_SETTLE_S, _SPARE_FILES, _START_S = 10.0, 16, 300.0
ENGINE = EngineConfig(max_model_len=64, kv_cache_bytes=2 << 20, max_num_seqs=16, progress=False)


class LiveNode:
    """A server and its event loop, in a thread of their own. Adapters may be loaded from `adapters`."""

    def __init__(self) -> None:
        """Start the server at a free port of this machine."""
        self._root = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.adapters = self._root / "adapters"
        for name, folder in adapter_folders().items():
            shutil.copytree(folder, self.adapters / name)
        self.engine = AsyncEngine(assemble(ENGINE), Telemetry(), 256)
        self.address = ""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="fuzz-server", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_S) or not self.address:
            raise RuntimeError("the server did not start: run python -m engine.serve to see why")
        self._files = _open_files()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the server's event loop. Raises Finding if it takes too long."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(ANSWER_S)
        except TimeoutError:
            future.cancel()
            raise Finding(f"no end after {ANSWER_S:g} s") from None

    def check(self) -> None:
        """Raise Finding if a request, a block or a file is still held, or the server is not healthy."""
        deadline_s = time.monotonic() + _SETTLE_S
        while (held := self._held()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        if held:
            raise Finding(f"left behind: {held}")

    def close(self) -> None:
        """Stop the server and remove its files."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_START_S)
        shutil.rmtree(self._root, ignore_errors=True)

    def _held(self) -> str:
        stats = self.engine.stats()
        counts = {
            "running sequences": stats.running,
            "waiting sequences": stats.waiting,
            "blocks": stats.blocks.used,
            "files": max(0, _open_files() - self._files - _SPARE_FILES),
            "health": stats.trouble is not None,
        }
        return ", ".join(f"{name}: {count}" for name, count in counts.items() if count)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        config = ServeConfig(engine=ENGINE, port=0, lora_roots=(self.adapters,), drain_s=1.0)
        try:
            self._loop.run_until_complete(serve(self.engine, config, self._announce, self._stop))
        finally:
            self._ready.set()
            self._loop.close()

    def _announce(self, address: str) -> None:
        self.address = address
        self._ready.set()


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
