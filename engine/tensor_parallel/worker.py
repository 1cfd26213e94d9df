"""Run one device's process: `python -m engine.tensor_parallel.worker`, started and directed by the first process.

Its WorkerGraphs replay decode steps as the first device does, which draws the tokens and sends what to run.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from engine.base.backends import Backends
from engine.base.base_model import BaseModel
from engine.base.machine_memory import retain_freed_memory
from engine.runner.cuda_graphs import BuffersByWidth, Capture, GraphParts, capture_for
from engine.tensor_parallel.channel import ChannelClosed, WorkerChannel
from engine.tensor_parallel.collective import ProcessGroup
from engine.tensor_parallel.messages import (
    Failed,
    Load,
    Loaded,
    PlaceShard,
    Ready,
    Reserve,
    ShardPlaced,
    Step,
    flat_size,
    rebuild,
)
from lora.format.packed import read_header
from lora.memory.sharded import ShardArena
from model.batch import ForwardBatch
from model.checkpoint_files import read_config
from model.kv_cache import KVCache
from model.llama import Llama
from model.parallel import Shard
from model.weights import Weights, WeightsForm


class WorkerGraphs:
    """Graphs that are captured and replayed when the first device's are.

    Both go by the same steps, so that they meet in every sum. Steps have at most `blocks` blocks a sequence.
    """

    def __init__(self, parts: GraphParts, blocks: int, capture: Capture) -> None:
        """Capture nothing yet."""
        self._buffers, self._capture = BuffersByWidth(parts, blocks), capture

    def run(self, batch: ForwardBatch) -> None:
        """Launch the step: every row of the first device's, the tables of those of its own."""
        buffers = self._buffers.get(len(batch.token_ids))
        buffers.fill(torch.stack((batch.token_ids, batch.positions, batch.slots)), batch.block_tables)
        step = buffers.batch(batch.context_lens, batch.segments)
        buffers.launch(step, buffers.forward, self._capture)


_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)}
_log = logging.getLogger(__name__)


class Worker:
    """One device other than the first, ready to compute."""

    def __init__(self, base: BaseModel, weights: Weights, reserve: Reserve) -> None:
        """Take memory as the first process says, and join it."""
        self._device = base.device
        self._processes = ProcessGroup(base.form.shard, base.device, Path(reserve.rendezvous))
        self._model: Llama = base.build(weights, self._processes)
        self._cache = KVCache(base.kv_layout(reserve.block_size), reserve.num_blocks, base.device)
        self.shards = ShardArena(reserve.adapter_bytes, base.device)
        parts = GraphParts.of(self._model, self._cache)
        self._graphs = WorkerGraphs(parts, reserve.graph_blocks, capture_for(base.device))

    @torch.inference_mode()
    def step(self, step: Step) -> None:
        """Compute a step along with the first device."""
        flat = torch.empty(flat_size(step), dtype=torch.int64, device=self._device)
        batch = rebuild(step, self._processes.broadcast(flat), self.shards.weights)
        if step.replayed:
            self._graphs.run(batch)
        else:
            self._model.forward(batch, self._cache)

    def keep(self, place: PlaceShard, rows: torch.Tensor) -> None:
        """Keep a shard of an adapter."""
        self.shards.write(place.digest, read_header(place.header), place.offset, rows)


def main(arguments: Sequence[str]) -> None:
    """Serve the process that holds the other ends of the two sockets that `arguments` name. Does not return."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process drains, then closes the channels
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    steps, adapters = (WorkerChannel(socket.socket(fileno=int(number))) for number in arguments)
    try:
        worker = _prepare(steps)
        threading.Thread(
            target=_keep_shards, args=(worker, adapters, steps), name="shards", daemon=True
        ).start()
        steps.send(Ready())
        while True:
            step = steps.receive()
            assert isinstance(step, Step), f"{step!r} is no step"
            worker.step(step)
    except ChannelClosed:
        _end(0)
    except Exception as error:  # noqa: BLE001 - the process's boundary: reported to the first process
        _fail(steps, error)


def _prepare(steps: WorkerChannel) -> Worker:
    load = steps.receive()
    assert isinstance(load, Load), f"{load!r} does not say what to load"
    retain_freed_memory()
    if load.threads:
        torch.set_num_threads(load.threads)
    device = torch.device(load.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    form = WeightsForm(Shard(load.rank, load.size), load.quantization, load.linear)
    folder = Path(load.folder)
    backends = Backends(load.attention, _DTYPES[load.lora_dtype], load.uses_triton)
    base = BaseModel(folder, read_config(folder), _DTYPES[load.dtype], device, form, backends)
    weights = base.load(progress=False)
    steps.send(Loaded())
    reserve = steps.receive()
    assert isinstance(reserve, Reserve), f"{reserve!r} does not say what to reserve"
    return Worker(base, weights, reserve)


def _keep_shards(worker: Worker, adapters: WorkerChannel, steps: WorkerChannel) -> None:
    """Keep shards as they come until the channel closes; then end, even if the main thread waits for a device."""
    try:
        while True:
            place = adapters.receive()
            assert isinstance(place, PlaceShard), f"{place!r} is no shard"
            rows = worker.shards.staging_buffer(place.nbytes)
            adapters.receive_into(rows.numpy().data)
            worker.keep(place, rows)
            adapters.send(ShardPlaced())
    except ChannelClosed:
        _end(0)
    except Exception as error:  # noqa: BLE001 - as in main
        _fail(steps, error)


def _fail(channel: WorkerChannel, error: Exception) -> None:
    _log.error("a worker cannot go on", exc_info=error)
    with suppress(ChannelClosed):  # the first process is gone: no process is left to report to
        channel.send(Failed(f"{type(error).__name__}: {error}"))
    _end(1)


def _end(code: int) -> None:
    """End the process at once: other threads may wait for devices that will not answer."""
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
