"""Open a checkpoint's files and read its tensors, or a device's part of them.

Of `model`, this module alone reads weights. Only safetensors are read, by memory map; pickled weights are refused.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora.format.sharding import ShardSpec
from model.checkpoint_files import CheckpointError, find_weight_files
from model.linear.base import Linear
from model.linear.choice import make_linear
from model.weights import WeightsForm

_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors call them
_COMPUTING = ("proj", "norm", "embed_tokens", "lm_head")  # in the names of tensors that a forward pass reads
_SAMPLED = 1 << 16  # elements of a tensor that are looked at


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """Open safetensors files by tensor name; each tensor, or its part within the cut, is mapped in when it is taken."""

    files: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    cut: ShardSpec
    form: WeightsForm

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the tensors are those `expected`, by name and shape, in floating point."""
        missing = [name for name in expected if name not in self.files]
        extra = [name for name in self.files if name not in expected and _matters(name)]
        present = [name for name in expected if name in self.files]
        wrong = [
            f"{name} is {found}, not {expected[name]}"
            for name in present
            if (found := self._shape(name)) != expected[name]
        ]
        mistyped = [
            f"{name} holds {found}, not {', '.join(_FLOATS)}"
            for name in present
            if (found := self.files[name].get_slice(name).get_dtype()) not in _FLOATS
        ]
        faults = [*(f"missing {name}" for name in missing), *(f"unexpected {name}" for name in extra)]
        faults += wrong + mistyped
        if faults:
            shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
            raise CheckpointError(f"the tensors do not fit config.json: {shown}")

    def take(self, name: str) -> Tensor:
        """Return the whole tensor."""
        return self._finite(name, self.files[name].get_tensor(name).to(self.device, self.dtype))

    def take_part(self, name: str, *spans: range) -> Tensor:
        """The tensor's elements whose indices are within `spans`, one for each of the first dimensions."""
        part = self.files[name].get_slice(name)[tuple(slice(span.start, span.stop) for span in spans)]
        return self._finite(name, part.to(self.device, self.dtype))

    def linear(self, prefix: str, sites: tuple[str, ...], biased: bool) -> Linear:
        """One matrix of the sites' outputs in their order. Where inputs are cut, the first device adds the bias."""
        cuts = {f"{prefix}.{site}": self.cut.of(site) for site in sites}
        weight = torch.cat(
            [self.take_part(f"{s}.weight", cut.outputs, cut.inputs) for s, cut in cuts.items()]
        )
        biases = [
            self.take_part(f"{s}.bias", cut.outputs) for s, cut in cuts.items() if biased and not cut.in_start
        ]
        return make_linear(
            weight, torch.cat(biases) if biases else None, self.form.quantization, self.form.linear
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor` if a sample of it, spread evenly, is finite."""
        step = (tensor.numel() // _SAMPLED) | 1  # odd, so that it meets every column
        if not tensor.reshape(-1)[::step].isfinite().all():
            dtype = str(self.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} holds NaN or infinity in {dtype}: fetch it again, or give another dtype"
            )
        return tensor


def _matters(name: str) -> bool:
    """Tell whether a tensor is of a part that the forward pass computes.

    Others, such as rope's buffers or the heads of other tasks, change nothing.
    """
    return name.startswith(("model.", "lm_head.")) and any(part in name for part in _COMPUTING)


def open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Open the folder's files until `stack` is closed; return by each tensor's name the file that holds it."""
    files: dict[str, Any] = {}
    for path in find_weight_files(folder):
        try:
            file = cast(Any, stack.enter_context(safe_open(path, framework="pt")))
        except (SafetensorError, OSError, UnicodeEncodeError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read, fetch it again: {error}") from error
        files |= dict.fromkeys(file.keys(), file)
    return files
