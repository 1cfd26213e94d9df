"""Start, watch and end the processes that compute along with this one.

They are started anew, never forked, and have no address: each has two sockets that only it and the first process
hold. A worker ends when those close, so that none outlives the first process, however that ended. When one ends
unasked, all have failed for good: the others are ended too, and the callbacks are called.
"""

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import WorkersFailed
from engine.tensor_parallel.channel import ChannelClosed, WorkerChannel
from engine.tensor_parallel.messages import (
    Failed,
    Load,
    Loaded,
    Message,
    PlaceShard,
    Ready,
    Reserve,
    ShardPlaced,
    Step,
)
from lora.format.packed import write_header
from lora.memory.sharded import ShardDelivery

_EXIT_S = 10.0  # for a worker to end by itself, before it is killed
_CAUSE_S = 5.0  # to learn the cause of a step that failed here because a worker had
_log = logging.getLogger(__name__)


class _WorkerProcess:
    """One worker's process and its two channels.

    On `adapters` it answers ShardPlaced, on `steps` what is asked for or Failed, which it may also send unasked.
    """

    def __init__(self, load: Load) -> None:
        self.rank = load.rank
        ends = [socket.socketpair() for _ in range(2)]
        theirs = [their for _, their in ends]
        self.steps, self.adapters = (WorkerChannel(ours) for ours, _ in ends)
        self._placing = threading.Lock()
        self._receiving = threading.Lock()
        self.reported: str | None = None
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if load.threads:
            environment["OMP_NUM_THREADS"] = str(load.threads)
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "engine.tensor_parallel.worker",
                    *(str(end.fileno()) for end in theirs),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | environment,
                pass_fds=[end.fileno() for end in theirs],
                start_new_session=True,  # a terminal's interrupt is for the first process, which ends this one
            )
        finally:
            for end in theirs:
                end.close()
        self.steps.send(load)

    def expect(self, kind: type[Message]) -> None:
        """Wait for the answer `kind` about loading. Raises ChannelClosed."""
        with self._receiving:
            answer = self.steps.receive()
            if isinstance(answer, Failed):
                self.reported = answer.reason
                raise ChannelClosed(answer.reason)
        assert isinstance(answer, kind), f"worker {self.rank} answered {answer!r}"

    def place(self, place: PlaceShard, rows: memoryview) -> None:
        """Have it keep a shard, and wait until it does. From any thread. Raises ChannelClosed."""
        with self._placing:
            self.adapters.send(place, rows)
            answer = self.adapters.receive()
        assert isinstance(answer, ShardPlaced), f"worker {self.rank} answered {answer!r}"

    def end_reason(self) -> str:
        """Find out why the process, which has ended, did."""
        with self._receiving:
            if self.reported is None:
                self.reported = self._read_reason()
        return self.reported

    def _read_reason(self) -> str:
        try:
            while not isinstance(answer := self.steps.receive(), Failed):
                pass
        except ChannelClosed:
            code = self.process.returncode
            return f"it was ended by signal {-code}" if code < 0 else f"it exited with {code}"
        return answer.reason

    def close(self) -> None:
        """Have the process end."""
        self.steps.close()
        self.adapters.close()


class WorkerPool:
    """Ranks 1 and up of a tensor-parallel model."""

    def __init__(self, loads: Sequence[Load]) -> None:
        """Start a process for each of `loads`. Raises WorkersFailed, here and later, when one of them has ended."""
        self._size = len(loads) + 1
        self._folder = Path(tempfile.mkdtemp(prefix="loraserve-"))
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._failure: WorkersFailed | None = None
        self._failed = threading.Event()  # set when a failure has been recorded
        self._closing = False
        self._lock = threading.Lock()
        self._callbacks: tuple[Callable[[], object], ...] = ()
        self._workers: list[_WorkerProcess] = []
        try:
            for load in loads:
                self._workers.append(_WorkerProcess(load))
        except OSError as error:
            self.close()
            raise WorkersFailed(
                len(self._workers) + 1, self._size, f"it cannot be started ({error})"
            ) from error
        for worker in self._workers:
            threading.Thread(
                target=self._watch, args=(worker,), name=f"watch-{worker.rank}", daemon=True
            ).start()

    @property
    def failure(self) -> WorkersFailed | None:
        """Why the workers compute no more, if they do not."""
        return self._failure

    def on_failure(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, from any thread, when the workers have failed; at once if they have."""
        with self._lock:
            failed = self._failure is not None
            if not failed:
                self._callbacks += (callback,)
        if failed:
            callback()

    def wait_loaded(self) -> None:
        """Wait until all have read their part of the model."""
        for worker in self._workers:
            self._exchange(worker, Loaded)

    def reserve(self, num_blocks: int, block_size: int, adapter_bytes: int, graph_blocks: int) -> Path:
        """Have all take memory and join the others; return the file by which the caller joins them too."""
        rendezvous = self._folder / "rendezvous"
        for worker in self._workers:
            self._send(worker, Reserve(str(rendezvous), num_blocks, block_size, adapter_bytes, graph_blocks))
        return rendezvous

    def wait_ready(self) -> None:
        """Wait until all can compute."""
        for worker in self._workers:
            self._exchange(worker, Ready)

    def step(self, step: Step) -> None:
        """Have all compute a step along with the caller."""
        for worker in self._workers:
            self._send(worker, step)

    def deliver(self, delivery: ShardDelivery) -> None:
        """Send a worker its shard of an adapter, and wait until it is in its place. From any thread."""
        worker, rows = self._workers[delivery.rank - 1], delivery.rows
        place = PlaceShard(delivery.digest, write_header(delivery.layout), delivery.offset, rows.numel())
        try:
            worker.place(place, rows.numpy().data)
        except ChannelClosed as error:
            raise self.cause(error) from error

    def cause(self, error: Exception) -> WorkersFailed:
        """Return why the workers failed, given the error that was met here; they have failed when this returns."""
        self._failed.wait(_CAUSE_S)
        return self.fail(0, f"{type(error).__name__}: {error}")

    def fail(self, rank: int, reason: str) -> WorkersFailed:
        """End the workers and return why; the first reason given stays."""
        with self._lock:
            if self._failure is not None:
                return self._failure
            self._failure = WorkersFailed(rank, self._size, reason)
            callbacks = self._callbacks
        self._failed.set()
        _log.error("%s", self._failure)
        for worker in self._workers:
            worker.close()
            worker.process.kill()
        for callback in callbacks:
            callback()
        return self._failure

    def close(self) -> None:
        """End all workers and wait until they have ended."""
        self._closing = True
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            try:
                worker.process.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._remove_folder()

    def _exchange(self, worker: _WorkerProcess, kind: type[Message]) -> None:
        try:
            worker.expect(kind)
        except ChannelClosed as error:
            raise self._lost(worker, error) from error

    def _send(self, worker: _WorkerProcess, message: Message) -> None:
        try:
            worker.steps.send(message)
        except ChannelClosed as error:
            raise self._lost(worker, error) from error

    def _lost(self, worker: _WorkerProcess, error: ChannelClosed) -> WorkersFailed:
        return self.fail(worker.rank, worker.reported) if worker.reported else self.cause(error)

    def _watch(self, worker: _WorkerProcess) -> None:
        """Wait until the process ends; unless that was asked for, the workers have failed."""
        worker.process.wait()
        if not self._closing and self._failure is None:
            self.fail(worker.rank, worker.end_reason())
