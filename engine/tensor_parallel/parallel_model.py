"""Compute a forward pass on all devices, called like that of one; and start the processes that do."""

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.base.base_model import BaseModel, device_of
from engine.tensor_parallel.collective import ProcessGroup
from engine.tensor_parallel.messages import Load, describe, flatten
from engine.tensor_parallel.worker_pool import WorkerPool
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
from model.weights import Weights


class ParallelModel:
    """The first device's `part` of a model, which has the others compute along in every step."""

    def __init__(self, part: Llama, workers: WorkerPool, processes: ProcessGroup) -> None:
        """Tell `workers` of each step, and send its tensors by `processes`."""
        self.part, self._workers, self._processes = part, workers, processes

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Compute as Llama.forward does.

        Raises WorkersFailed for whatever goes wrong on any device: they are then out of step, and none computes any
        more.
        """
        with self.joint_step():
            self._send(batch, replayed=False)
            return self.part.forward(batch, cache)

    def lead(self, batch: ForwardBatch) -> None:
        """Have the others replay the step that is replayed here next, within one `joint_step`."""
        self._send(batch, replayed=True)

    @contextmanager
    def joint_step(self) -> Generator[None]:
        """Surround a step of all devices: what is raised within ends the workers. Raises WorkersFailed."""
        self.check()
        try:
            yield
        except Exception as error:
            raise self._workers.cause(error) from error
        except BaseException:  # an interrupt within a step leaves the others waiting for the rest of it
            self._workers.fail(0, "it was interrupted within a step")
            raise

    def check(self) -> None:
        """Raise WorkersFailed if the devices compute no more."""
        if self._workers.failure is not None:
            raise self._workers.failure

    def _send(self, batch: ForwardBatch, replayed: bool) -> None:
        self._workers.step(describe(batch, replayed))
        self._processes.broadcast(flatten(batch))


def start_workers(base: BaseModel) -> WorkerPool | None:
    """Start a process for each part of `base` but the first, which begins to read it; None if there is one part.

    The processors of a CPU are divided equally, unless the environment says how many threads there are to be.
    """
    size = base.form.shard.size
    if size == 1:
        return None
    threads = 0
    if base.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // size)
        torch.set_num_threads(threads)
    return WorkerPool([_load(base, rank, threads) for rank in range(1, size)])


def join(
    base: BaseModel,
    weights: Weights,
    workers: WorkerPool,
    cache: KVCache,
    adapter_bytes: int,
    graph_blocks: int,
) -> ParallelModel:
    """Join this process and `workers` to the model of all devices, when `weights` and theirs are loaded.

    Each takes memory as this one did. Replayed steps have at most `graph_blocks` blocks a sequence.
    """
    rendezvous = workers.reserve(cache.num_blocks, cache.block_size, adapter_bytes, graph_blocks)
    processes = ProcessGroup(base.form.shard, base.device, rendezvous)
    workers.on_failure(processes.abort)
    workers.wait_ready()
    return ParallelModel(base.build(weights, processes), workers, processes)


def _load(base: BaseModel, rank: int, threads: int) -> Load:
    return Load(
        folder=str(base.folder),
        rank=rank,
        size=base.form.shard.size,
        device=str(device_of(base.device, rank)),
        dtype=str(base.dtype),
        quantization=base.form.quantization,
        linear=base.form.linear,
        attention=base.backends.attention,
        lora_dtype=str(base.backends.lora_dtype),
        uses_triton=base.backends.uses_triton,
        threads=threads,
    )
