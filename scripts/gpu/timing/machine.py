"""Describe the machine, and measure the two ceilings that everything else is held against."""

# torch does not type a device's properties.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import importlib.util
import platform
import subprocess
from collections.abc import Iterator

import torch

from scripts.gpu.context import CheckContext
from scripts.gpu.finding import Finding, measured, skipped

_WANTED = (
    *("triton", "flashinfer"),
    *("blake3", "jinja2", "msgspec", "safetensors", "tokenizers", "tqdm", "transformers"),  # the engine's
)
_ASKED = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def findings(context: CheckContext) -> Iterator[Finding]:
    """Find what runs, on what, and how fast it copies and multiplies."""
    yield measured("torch", torch.__version__, note=f"python {platform.python_version()}")
    lacking = [name for name in _WANTED if importlib.util.find_spec(name) is None]
    note = f"not here: {', '.join(lacking)}" if lacking else ""
    yield measured("packages", len(_WANTED) - len(lacking), f"of {len(_WANTED)}", note)
    yield from _card(context)
    yield from context.try_finding("copy", lambda: _copy(context))
    yield from context.try_finding("matrix product", lambda: _product(context))


def _card(context: CheckContext) -> Iterator[Finding]:
    if context.is_dry_run:
        yield measured("device", platform.machine(), note="a dry run on the CPU: its times mean nothing")
        return
    card = torch.cuda.get_device_properties(context.device)
    free, total = torch.cuda.mem_get_info(context.device)
    note = f"{card.multi_processor_count} multiprocessors, sm_{card.major}{card.minor}, cuda {torch.version.cuda}"
    yield measured("device", card.name, note=note)
    yield measured("memory", free / 2**30, "GiB free", f"of {total / 2**30:.1f} GiB")
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        yield skipped("driver and clocks", f"nvidia-smi: {error}")
        return
    fields = dict(zip(_ASKED, [each.strip() for each in answer.splitlines()[0].split(",")], strict=False))
    yield measured("driver", fields.get("driver_version", ""), note=str(fields), **fields)


def _copy(context: CheckContext) -> Finding:
    return measured("copy", context.copy_bytes_per_s / 1e12, "TB/s", "bytes read and bytes written")


def _product(context: CheckContext) -> Finding:
    n, dtype = context.sizes.square, torch.bfloat16
    pairs = [(context.normal(n, n, dtype=dtype), context.normal(n, n, dtype=dtype)) for _ in range(2)]
    out, turn = torch.empty(n, n, dtype=dtype, device=context.device), iter(range(1 << 30))

    def run() -> None:
        left, right = pairs[next(turn) % 2]
        torch.mm(left, right, out=out)

    took_ms = context.median_ms(run, 10)
    return measured("matrix product", 2 * n**3 / took_ms / 1e9, "TFLOP/s", f"bf16, {n} cubed, random data")
