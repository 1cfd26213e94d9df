"""Time other engines' LoRA kernels beside ours, where their packages are installed.

It is shrink and expand of one projection of the timed model, each sequence its own adapter, ranks mixed.
Theirs have storage padded to rank 128, as they keep it. Only what they compute is timed, in a graph over
several sets of weights. They are called by the names and arguments of their published sources; where those
have changed the finding says so.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lora.target_modules import SiteGroup
from scripts.gpu.backends.base import Run
from scripts.gpu.context import CheckContext
from scripts.gpu.correctness.inputs import table_of
from scripts.gpu.finding import Finding, measured, skipped
from scripts.gpu.timing.timed_model import MIXES, TimedModel

_SETS = 8  # of weights, more than a cache holds
_PADDED = 128


@dataclass(frozen=True, slots=True)
class ProjectionCase:
    """A projection's input and output, and which ranks its rows' adapters have."""

    timed: TimedModel
    x: Tensor
    y: Tensor
    ranks: list[int]

    @property
    def rows(self) -> Tensor:
        """Row numbers, [T]."""
        return torch.arange(len(self.ranks), device=self.x.device)

    def weights(self, outputs: int, inputs: int) -> Tensor:
        """Draw weights, [adapters, outputs, inputs]."""
        return self.timed.context.normal(len(self.ranks), outputs, inputs, dtype=self.x.dtype) * 0.02


def findings(context: CheckContext) -> Iterator[Finding]:
    """Time ours, and each vendor's."""
    timed, width = context.once(TimedModel), context.sizes.widths[0]
    site = timed.base.of(SiteGroup.OUT.sites[0])
    x, y = (context.normal(width, size, dtype=timed.dtype) for size in (site.in_features, site.out_features))
    case = ProjectionCase(timed, x, y, MIXES["uniform 8..128"](width))
    yield from context.try_finding("ours", lambda: _time("ours", case, _ours(case)))
    for name, module, make in (
        ("vllm", "vllm.lora.ops.triton_ops", _vllm),
        ("sglang", "sglang.srt.lora.triton_ops", _sglang),
    ):
        try:
            finding = _time(name, case, make(importlib.import_module(module), case))
        except Exception as error:  # noqa: BLE001 - another project's code may raise anything
            finding = skipped(name, f"{type(error).__name__}: {error}".splitlines()[0])
        yield finding


def _time(name: str, case: ProjectionCase, step: Callable[[int], None]) -> Finding:
    """Time `step`, which computes with one of the sets of weights."""
    context = case.timed.context

    @torch.inference_mode()
    def all_sets() -> None:
        for number in range(_SETS):
            step(number)

    run: Run = context.backends.record(all_sets)
    took_us = 1e3 * context.median_ms(run, 20) / _SETS
    site = case.timed.base.of(SiteGroup.OUT.sites[0])
    exact = sum(case.ranks) * (site.in_features + site.out_features) * case.x.dtype.itemsize
    return measured(
        name, took_us, "us", f"floor {1e6 * exact / context.copy_bytes_per_s:.1f} us", nbytes=exact
    )


def _ours(case: ProjectionCase) -> Callable[[int], None]:
    timed = case.timed
    adapters = timed.adapters(case.ranks)
    table = table_of([(1, row) for row in range(len(adapters))], adapters)
    step = timed.context.backends.lora(timed.base, timed.dtype).plan(table)
    layers = timed.config.num_layers
    return lambda number: step.add_lora(case.y, case.x, number % layers, SiteGroup.OUT)


def _vllm(package: ModuleType, case: ProjectionCase) -> Callable[[int], None]:
    count = len(case.ranks)
    meta = package.LoRAKernelMeta.make(count, count, device=case.x.device)
    meta.prepare_tensors(case.rows.to(torch.int32))
    wanted = len(inspect.signature(meta.meta_args).parameters)
    given = meta.meta_args(*(count, False)[:wanted])
    h = torch.empty(1, count, _PADDED, dtype=torch.float32, device=case.x.device)
    weights = [
        (
            [case.weights(_PADDED, case.x.shape[1])[:, None].contiguous()],
            [case.weights(case.y.shape[1], _PADDED)[:, None].contiguous()],
        )
        for _ in range(_SETS)
    ]

    def step(number: int) -> None:
        a, b = weights[number]
        package.lora_shrink(case.x, a, h, *given, 1.0)
        package.lora_expand(h, b, case.y, *given, offset_start=0, add_inputs=True)

    return step


def _sglang(package: ModuleType, case: ProjectionCase) -> Callable[[int], None]:
    info = _batch_info(importlib.import_module("sglang.srt.lora.utils").LoRABatchInfo, case)
    shrink = importlib.import_module(
        f"{package.__name__}.chunked_sgmv_shrink"
    ).chunked_sgmv_lora_shrink_forward
    expand = importlib.import_module(
        f"{package.__name__}.chunked_sgmv_expand"
    ).chunked_sgmv_lora_expand_forward
    outputs, inputs = case.y.shape[1], case.x.shape[1]
    offsets = torch.tensor([0, outputs], dtype=torch.int32, device=case.x.device)
    weights = [(case.weights(_PADDED, inputs), case.weights(outputs, _PADDED)) for _ in range(_SETS)]

    def step(number: int) -> None:
        a, b = weights[number]
        h = shrink(case.x, a, info, 1)
        expand(h, b, info, offsets, outputs, case.y)

    return step


def _batch_info(kind: type, case: ProjectionCase) -> object:
    """Describe a batch in which every row is a segment of its own."""
    count, device = len(case.ranks), case.x.device
    rows = case.rows.to(torch.int32)
    known = {
        "use_cuda_graph": True,
        "bs": count,
        "num_segments": count,
        "seg_indptr": torch.arange(count + 1, dtype=torch.int32, device=device),
        "weight_indices": rows,
        "lora_ranks": torch.tensor(case.ranks, dtype=torch.int32, device=device),
        "scalings": torch.ones(count, device=device),
        "max_len": 16,
        "seg_lens": torch.ones(count, dtype=torch.int32, device=device),
        "permutation": rows,
    }
    fields = {each.name for each in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in known.items() if name in fields})
