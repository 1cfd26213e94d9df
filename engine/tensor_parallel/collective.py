"""Join the processes of one model by torch.distributed: NCCL among GPUs, gloo on loopback among CPU processes.

The only module that knows torch.distributed. It makes no default group, so that engines of one process stay apart.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from model.parallel import Shard

_C10D: Any = dist  # torch's stubs know neither its stores nor a process group's options
_TIMEOUT = timedelta(seconds=120)  # longer than any layer of any step; a worker that died is noticed at once


class ProcessGroup:
    """A Collective over processes, and the broadcast of a step's tensors from the first.

    Any method raises RuntimeError when another process is gone.
    """

    def __init__(self, shard: Shard, device: torch.device, rendezvous: Path) -> None:
        """Wait for the others, which name the same file."""
        store = _C10D.FileStore(str(rendezvous), shard.size)
        self._shard = shard
        self._group = (_nccl if device.type == "cuda" else _gloo)(store, shard)
        self._from_first = dist.BroadcastOptions()
        self._from_first.rootRank = self._from_first.rootTensor = 0
        self._to_first = dist.GatherOptions()
        self._to_first.rootRank = 0

    def sum(self, x: Tensor) -> Tensor:
        """See Collective."""
        self._group.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        """See Collective."""
        x = x.contiguous()
        first = self._shard.rank == 0
        parts = [torch.empty_like(x) for _ in range(self._shard.size)] if first else []
        self._group.gather([parts] if first else [], [x], self._to_first).wait()
        return torch.cat(parts, dim=1) if first else x

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace `x`, which has the same shape everywhere, by the first process's."""
        self._group.broadcast([x], self._from_first).wait()
        return x

    def abort(self) -> None:
        """Have calls that wait for a process that is gone wait no longer."""
        self._group.abort()


def _gloo(store: object, shard: Shard) -> Any:
    options = _C10D.ProcessGroupGloo._Options()
    options._timeout = _TIMEOUT
    options._devices = [_C10D.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return _C10D.ProcessGroupGloo(store, shard.rank, shard.size, options)


def _nccl(store: object, shard: Shard) -> Any:
    options = _C10D.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return _C10D.ProcessGroupNCCL(store, shard.rank, shard.size, options)
