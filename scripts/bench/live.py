"""The engine that live measurements share: profile, twin and interference must run the same limits, or they say
nothing of each other."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engine.build.assembly import Engine, ExecutorWrapper, assemble
from engine.config.config import Device, EngineConfig
from lora.adapter import AdapterRef
from model.checkpoint import DtypeChoice, find_checkpoint, read_config, serving_dtype
from scheduler.limits import StepLimits
from scripts.bench import machine, workload
from scripts.make_bench_models import RANKS, Shape, make_adapter

LIMITS = StepLimits(max_num_seqs=64, max_num_batched_tokens=256, max_model_len=1024, adapter_patience_s=2.0)
BLOCK_TOKENS = 16
KV_BYTES = 1 << 30
SPARE_BYTES = 1 << 28
EXTENSIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "sve", "asimd")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a base model (folder or hub id), adapters (an index.json, or None for synthetic ones),
    a device, a dtype, and the threads of torch (0: its own choice)."""

    model: str
    index: Path | None
    device: Device = "auto"
    dtype: DtypeChoice = "auto"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Room:
    """What a node may do in a step, and its K/V blocks."""

    limits: StepLimits
    kv_blocks: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Live:
    """A live engine with all its adapters, the rank rising, its room, and how it is to be described."""

    engine: Engine
    adapters: tuple[AdapterRef, ...]
    hardware: str
    base_model: str
    room: Room


def start(subject: Subject, around: ExecutorWrapper, scratch: ExitStack) -> Live:
    """Assemble the engine, with `around` its executor; it ends with `scratch`."""
    if subject.threads:
        torch.set_num_threads(subject.threads)
    folders = _folders(subject, scratch)
    config = _config(subject, folders)
    engine = assemble(config, around)
    scratch.callback(engine.close)
    refs = (engine.store.resolve(name) for name, _ in folders)
    stats = engine.core.block_stats()
    return Live(
        engine=engine,
        adapters=tuple(sorted(refs, key=lambda ref: (ref.rank, ref.name))),
        hardware=hardware(subject),
        base_model=base_model(subject),
        room=Room(LIMITS, stats.used + stats.cached + stats.free, BLOCK_TOKENS),
    )


def hardware(subject: Subject) -> str:
    """Processor, cores, vector extension and threads; no names of machines."""
    if _on_cuda(subject):
        return torch.cuda.get_device_name()
    about, threads = machine.describe(), torch.get_num_threads()
    flags = Path("/proc/cpuinfo").read_text().split()
    extension = next((name for name in EXTENSIONS if name in flags), "no vector extension")
    used = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{about['cpu']}, {about['cores']} cores, {extension}, {used}"


def base_model(subject: Subject) -> str:
    """Its name and the dtype in which it runs."""
    folder, device = find_checkpoint(subject.model), torch.device("cuda" if _on_cuda(subject) else "cpu")
    dtype = serving_dtype(read_config(folder), subject.dtype, device)
    return f"{folder.resolve().name}, {str(dtype).removeprefix('torch.')}"


def _on_cuda(subject: Subject) -> bool:
    return subject.device == "cuda" or (subject.device == "auto" and torch.cuda.is_available())


def _config(subject: Subject, folders: list[tuple[str, Path]]) -> EngineConfig:
    packed = sum(file.stat().st_size for _, folder in folders for file in folder.glob("*.safetensors"))
    return EngineConfig(
        model=subject.model,
        loras=dict(folders),
        device=subject.device,
        dtype=subject.dtype,
        max_model_len=LIMITS.max_model_len,
        max_num_seqs=LIMITS.max_num_seqs,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
        block_size=BLOCK_TOKENS,
        kv_cache_bytes=KV_BYTES,
        adapter_bytes=2 * packed + SPARE_BYTES,  # float32 may double what the files hold
        adapter_patience_s=LIMITS.adapter_patience_s,
        progress=False,
    )


def _folders(subject: Subject, scratch: ExitStack) -> list[tuple[str, Path]]:
    """Names and folders of the index's adapters, or of synthetic ones: seven of each rank."""
    if subject.index is not None:
        return [(entry.name, Path(entry.path)) for entry in workload.read_index(subject.index)]
    base = find_checkpoint(subject.model)
    found = read_config(base)
    shape = Shape(
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
