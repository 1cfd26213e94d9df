"""Start the engine that live measurements share.

Profile, twin and interference must run under the same limits, or their results cannot be compared.
"""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engine.assembly.assembly import Engine, ExecutorWrapper, assemble
from engine.config.config import Device, EngineConfig
from lora.adapter import AdapterRef
from model.checkpoint import serving_dtype
from model.checkpoint_files import find_checkpoint, read_config
from model.config import DtypeChoice
from scheduler.limits import StepLimits
from scripts.bench import machine
from scripts.bench.llama import RANKS, LlamaShape, read_index
from scripts.bench.make_models import make_adapter

LIMITS = StepLimits(max_num_seqs=64, max_num_batched_tokens=256, max_model_len=1024, adapter_patience_s=2.0)
BLOCK_TOKENS = 16
KV_BYTES = 1 << 30
SPARE_BYTES = 1 << 28
EXTENSIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "sve", "asimd")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What is measured: a base model (folder or hub id), adapters, a device, a dtype, and torch's threads.

    `index` is an index.json of the adapters, None for synthetic ones. With 0 threads torch chooses.
    """

    model: str
    index: Path | None
    device: Device = "auto"
    dtype: DtypeChoice = "auto"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What a node may do in a step, and its K/V blocks."""

    limits: StepLimits
    kv_blocks: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class LiveEngine:
    """A live engine with all its adapters, the rank rising, its capacity, and how it is to be described."""

    engine: Engine
    adapters: tuple[AdapterRef, ...]
    hardware: str
    base_model: str
    capacity: NodeCapacity


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a base model, its adapters, and torch's threads."""
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--adapters", type=Path, help="an index.json; synthetic ones without it")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU; 0 leaves it to torch")


def start_engine(spec: EngineSpec, around: ExecutorWrapper, scratch: ExitStack) -> LiveEngine:
    """Assemble the engine, with `around` its executor; it ends with `scratch`."""
    if spec.threads:
        torch.set_num_threads(spec.threads)
    folders = _folders(spec, scratch)
    config = _config(spec, folders)
    engine = assemble(config, around)
    scratch.callback(engine.close)
    refs = (engine.store.registry.resolve(name) for name, _ in folders)
    stats = engine.core.block_stats()
    return LiveEngine(
        engine=engine,
        adapters=tuple(sorted(refs, key=lambda ref: (ref.rank, ref.name))),
        hardware=hardware(spec),
        base_model=base_model(spec),
        capacity=NodeCapacity(LIMITS, stats.used + stats.cached + stats.free, BLOCK_TOKENS),
    )


def hardware(spec: EngineSpec) -> str:
    """Describe processor, cores, vector extension and threads; name no machine."""
    if _on_cuda(spec):
        return torch.cuda.get_device_name()
    about, threads = machine.describe(), torch.get_num_threads()
    flags = Path("/proc/cpuinfo").read_text().split()
    extension = next((name for name in EXTENSIONS if name in flags), "no vector extension")
    used = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{about['cpu']}, {about['cores']} cores, {extension}, {used}"


def base_model(spec: EngineSpec) -> str:
    """Describe the model by its name and the dtype in which it runs."""
    folder, device = find_checkpoint(spec.model), torch.device("cuda" if _on_cuda(spec) else "cpu")
    dtype = serving_dtype(read_config(folder), spec.dtype, device)
    return f"{folder.resolve().name}, {str(dtype).removeprefix('torch.')}"


def _on_cuda(spec: EngineSpec) -> bool:
    return spec.device == "cuda" or (spec.device == "auto" and torch.cuda.is_available())


def _config(spec: EngineSpec, folders: list[tuple[str, Path]]) -> EngineConfig:
    packed = sum(file.stat().st_size for _, folder in folders for file in folder.glob("*.safetensors"))
    return EngineConfig(
        self_test=False,
        model=spec.model,
        loras=dict(folders),
        device=spec.device,
        dtype=spec.dtype,
        max_model_len=LIMITS.max_model_len,
        max_num_seqs=LIMITS.max_num_seqs,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
        block_size=BLOCK_TOKENS,
        kv_cache_bytes=KV_BYTES,
        adapter_bytes=2 * packed + SPARE_BYTES,  # float32 may double what the files hold
        adapter_patience_s=LIMITS.adapter_patience_s,
        progress=False,
    )


def _folders(spec: EngineSpec, scratch: ExitStack) -> list[tuple[str, Path]]:
    """List names and folders of the index's adapters, or make seven synthetic ones of each rank."""
    if spec.index is not None:
        return [(entry.name, Path(entry.path)) for entry in read_index(spec.index)]
    base = find_checkpoint(spec.model)
    found = read_config(base)
    shape = LlamaShape(
        found.hidden_size,
        found.num_layers,
        found.num_heads,
        found.num_kv_heads,
        found.head_dim,
        found.intermediate_size,
    )
    root = Path(scratch.enter_context(TemporaryDirectory()))
    named = [(f"r{rank}-{number}", rank) for rank in RANKS for number in range(7)]
    for seed, (name, rank) in enumerate(named):
        make_adapter(shape, rank, base, root / name, seed)
    return [(name, root / name) for name, _ in named]
