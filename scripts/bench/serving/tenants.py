"""Make many adapters with known answers out of the embedded ones, and change them while a server is under load.

A tenant is an embedded adapter at a larger rank: the new rows of A are random, the new columns of B zero, and the order
of all is drawn. So every tenant has a content of its own and computes what its original does: answers can be checked.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import torch
from safetensors.torch import load, save

from engine.demo.embedded import TASKS, adapter_folders
from scripts.bench.serving.server import ServerFailed

RANKS = (8, 16, 32, 64, 128)
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def task_name(model: str) -> str:
    """Return the name of the task that a tenant, or an embedded adapter, was trained for."""
    return model.partition("-")[0]


def write_tenants(folder: Path, count: int, rng: Random) -> tuple[str, ...]:
    """Write `count` tenants' PEFT folders below `folder`; return their names, which are those of the folders."""
    names = tuple(f"{TASKS[number % len(TASKS)].name}-{number:04d}" for number in range(count))
    for name in names:
        write_tenant(folder / name, task_name(name), rng)
    return names


def write_tenant(folder: Path, task: str, rng: Random) -> None:
    """Write one PEFT folder: the embedded adapter of `task` at a drawn rank, which is never below its own."""
    original = adapter_folders()[task]
    config: dict[str, Any] = json.loads((original / _CONFIG).read_text())
    weights = load((original / _WEIGHTS).read_bytes())
    own_rank = max(tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name)
    rank = rng.choice([rank for rank in RANKS if rank >= own_rank])
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    order = torch.randperm(rank, generator=generator)
    widened = {
        name: _widened(tensor, order, None if "lora_A" in name else _scale(config, name), generator)
        for name, tensor in weights.items()
    }
    # The scale of each module is in its B now: what is left of it is one.
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    folder.mkdir(parents=True)
    (folder / _WEIGHTS).write_bytes(save(widened))
    (folder / _CONFIG).write_text(json.dumps(config))


def _scale(config: Mapping[str, Any], tensor_name: str) -> float:
    """Return the factor of the module that a tensor belongs to, by the patterns that end its name."""
    module = tensor_name.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2]
    rank: int = config["rank_pattern"].get(module, config["r"])
    alpha: float = config["alpha_pattern"].get(module, config["lora_alpha"])
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


def _widened(
    tensor: torch.Tensor, order: torch.Tensor, scale: float | None, generator: torch.Generator
) -> torch.Tensor:
    """Add random rows to A [rank, in], or zero columns to B [out, rank] times `scale`; put the ranks in `order`."""
    if scale is None:
        rows = torch.randn(len(order) - tensor.shape[0], tensor.shape[1], generator=generator)
        return torch.cat([tensor, rows.to(tensor.dtype)])[order]
    columns = tensor.new_zeros(tensor.shape[0], len(order) - tensor.shape[1])
    return torch.cat([tensor * scale, columns], dim=1)[:, order].contiguous()


class TenantChurn:
    """Changes a server's tenants while it answers, in turns: a reload of one that is asked for, then a spare one.

    A reload gives a name another content that answers alike. A spare is loaded and unloaded under a name that nobody
    asks for. So no request may fail of it.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, folder: Path, rng: Random) -> None:
        """Write new contents below `folder`, from where the server may load."""
        self._session, self._url, self._folder, self._rng = session, url, folder, rng
        self.reloads = 0
        self.spares = 0

    async def run(self, names: Sequence[str], every_s: float) -> None:
        """Change something every `every_s` seconds, until cancelled. Raises ServerFailed if one is refused."""
        while True:
            await asyncio.sleep(every_s)
            await self._load(self._rng.choice(names), load_inplace=True)
            self.reloads += 1
            await asyncio.sleep(every_s)
            spare = f"{self._rng.choice(TASKS).name}-spare"
            await self._load(spare)
            await self._post("/v1/unload_lora_adapter", {"lora_name": spare})
            self.spares += 1

    async def _load(self, name: str, **fields: object) -> None:
        folder = self._folder / f"{name}.{self.reloads + self.spares}"
        await asyncio.to_thread(write_tenant, folder, task_name(name), self._rng)
        body = {"lora_name": name, "lora_path": str(folder), **fields}
        await self._post("/v1/load_lora_adapter", body)

    async def _post(self, path: str, body: dict[str, object]) -> None:
        async with self._session.post(self._url + path, json=body) as response:
            if response.status != HTTPStatus.OK:
                raise ServerFailed(f"{path} of {body['lora_name']}: {(await response.text())[:300]}")
