"""Choose the arithmetic between a layer's matrices: the one place that knows both kinds."""

import torch

from lora.ops.base import LoraOp
from lora.ops.grouped import GroupedLora
from lora.ops.native.library import load_add_lora
from lora.ops.native.native_lora import MANY_ROWS, NativeLora
from lora.target_modules import BaseShape
from model.config import LinearName, ModelConfig
from model.ops.base import LayerOps
from model.ops.eager import EagerOps
from model.ops.native.library import load_row_functions
from model.ops.native.native_rows import DTYPES as NATIVE_DTYPES
from model.ops.native.native_rows import NativeRows
from model.ops.row_ops import RowOps, TorchRows


def make_ops(
    config: ModelConfig,
    base: BaseShape,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    device: torch.device,
    uses_triton: bool,
    linear: LinearName = "torch",
) -> LayerOps:
    """Make a layer's operations for a model of `dtype`, or a part of one, and adapters of `lora_dtype`.

    Adapters, or their shares, fit `base`.

    Long segments of rows are torch's where `linear` is, since its bfloat16 product is the faster one there.

    In Triton each consumer of a projection adds the adapters' share itself; in plain torch that is a step of its own.
    """
    if not uses_triton:
        return EagerOps(
            config, dtype, device, _make_lora(lora_dtype, device, linear), _make_rows(dtype, device)
        )
    # Imported when it is chosen: where nothing chooses it, Triton may be absent.
    from lora.ops.triton.op import TritonLora  # noqa: PLC0415
    from model.ops.triton.layer import TritonOps  # noqa: PLC0415

    return TritonOps(config, dtype, TritonLora(base, lora_dtype, device))


def _make_rows(dtype: torch.dtype, device: torch.device) -> RowOps:
    functions = load_row_functions() if device.type == "cpu" and dtype in NATIVE_DTYPES else None
    return TorchRows() if functions is None else NativeRows(functions)


def _make_lora(lora_dtype: torch.dtype, device: torch.device, linear: LinearName) -> LoraOp:
    add = load_add_lora() if device.type == "cpu" else None
    return (
        GroupedLora()
        if add is None
        else NativeLora(add, lora_dtype, MANY_ROWS if linear == "torch" else None)
    )
