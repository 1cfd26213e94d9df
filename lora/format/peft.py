"""A PEFT folder becomes a packed form, or a reason why not. Never a silently wrong adapter.

What an adapter changes is read from the names of its tensors and checked against its configuration: every
target has both matrices, every matrix belongs to a target, and ranks and shapes fit. The room knows nothing of
residency; it reads a folder and writes none.
"""

import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lora.adapter import AdapterRef
from lora.errors import AdapterRefused
from lora.format.adapter_files import WEIGHTS_FILE, Flaw, read_regular_file, short
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from lora.format.packed import Module, PackedLayout, digest_of, matrix, packed_layout
from lora.format.peft_config import CONFIG_FILE, INVOCATION_FIELD, LoraSettings, read_settings
from lora.format.tensor_names import TensorName, copied_site, module_paths, parse_tensor_name
from lora.target_modules import OUTER_SITES, SITES, BaseShape

MOST_HEADER_BYTES = 1 << 24
_MOST_UPDATE = math.sqrt(torch.finfo(torch.float32).max)
PICKLE_FILE = "adapter_model.bin"

_SERVED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in its packed form, on the host. rows: [layout.nbytes] uint8."""

    ref: AdapterRef
    layout: PackedLayout
    rows: Tensor


@dataclass(frozen=True, slots=True)
class _Pair:
    """One module's tensors as they are in the file, A: [r, in], B: [out, r]; or divided such that `step` times their
    product is what the file's is."""

    path: str
    layer: int
    site: str
    A: Tensor
    B: Tensor
    step: float = 1.0


def most_file_bytes(most_bytes: int, dtype: torch.dtype) -> int:
    """Return how large a weights file may be whose packed form takes `most_bytes`: its numbers take 4 bytes at most."""
    return most_bytes // dtype.itemsize * 4 + MOST_HEADER_BYTES


def pack(
    name: str,
    folder: Path,
    base: BaseShape,
    dtype: torch.dtype,
    most_bytes: int = sys.maxsize,
    roots: AllowedRoots = ANYWHERE,
) -> PackedAdapter:
    """Read the PEFT folder and pack it in the serving `dtype`. Raises AdapterRefused with the exact reason.

    A file whose packed form would need more than `most_bytes` is not read, nor one that is not below `roots`.
    """
    try:
        settings = read_settings(folder, roots)
        pairs = _read_pairs(folder, base, most_file_bytes(most_bytes, dtype), roots)
        _check_targets(settings, pairs, base)
        _check_activation(settings, pairs)
        for pair in pairs.values():
            _check_shapes(settings, pair, base)
        pairs = {path: _in_steps(pair, dtype) for path, pair in pairs.items()}
        modules = [
            Module(p.layer, p.site, p.A.shape[0], settings.scale(p.path) * p.step) for p in pairs.values()
        ]
        layout = packed_layout(base, dtype, modules, settings.invocation)
        rows = _fill(layout, {(pair.layer, pair.site): pair for pair in pairs.values()})
        for module, pair in zip(modules, pairs.values(), strict=True):
            _check_update(pair, module.scale, dtype)
    except Flaw as flaw:
        raise AdapterRefused(name, str(flaw), flaw.may_pass) from flaw
    return PackedAdapter(layout.ref(digest_of(layout, rows), name), layout, rows)


def _read_pairs(folder: Path, base: BaseShape, most_bytes: int, roots: AllowedRoots) -> dict[str, _Pair]:
    """Every module's A and B, by module path."""
    halves: dict[str, dict[str, Tensor]] = {}
    names: dict[str, TensorName] = {}
    tensors = _read_tensors(folder, most_bytes, roots)
    for tensor_name, tensor in tensors.items():
        if copied_site(tensor_name) is not None:
            continue
        name = parse_tensor_name(tensor_name)
        sides = halves.setdefault(name.path, {})
        if name.side in sides:
            raise Flaw(f"{WEIGHTS_FILE} has lora_{name.side} of {name.path} twice: keep one")
        _check_tensor(tensor_name, tensor)
        sides[name.side] = tensor
        names[name.path] = name
    if not halves:
        raise Flaw(
            f"{WEIGHTS_FILE} holds no tensors: save the adapter again, with all ranks' shards gathered"
        )
    if len(prefixes := {name.root for name in names.values()} - {None}) > 1:
        raise Flaw(
            f"{WEIGHTS_FILE} names modules below different roots {sorted(map(str, prefixes))}: use one of them"
        )
    _check_copies(tensors, {name.site for name in names.values()}, base)
    return {path: _pair(names[path], sides) for path, sides in halves.items()}


def _check_copies(tensors: Mapping[str, Tensor], sites: Collection[str], base: BaseShape) -> None:
    """Refuse a base weight that is not beside a LoRA on it, or not of this base: it would have to be replaced."""
    for tensor_name, tensor in tensors.items():
        site = copied_site(tensor_name)
        if site is None:
            continue
        shape = base.of(site)
        wanted = shape.out_features, shape.in_features
        if site == "embed_tokens":
            wanted = wanted[::-1]  # a table, not a projection of ids
        if site not in sites or tuple(tensor.shape) != wanted:
            raise Flaw(
                f"{WEIGHTS_FILE} has the tensor {short(tensor_name)} of shape {tuple(tensor.shape)}: beside a LoRA on"
                f" {site} the base's weight, of shape {wanted}, is passed over; a new {site} is not served: remove it,"
                " or train a LoRA on it"
            )


def _read_tensors(folder: Path, most_bytes: int, roots: AllowedRoots) -> Mapping[str, Tensor]:
    """All tensors of the folder, whose file has at most so many bytes."""
    path = folder / WEIGHTS_FILE
    try:
        content = read_regular_file(path, most_bytes, roots)
        header_bytes = int.from_bytes(content[:8], "little")
        if header_bytes > MOST_HEADER_BYTES:
            raise ValueError(f"a header of {header_bytes} bytes, at most {MOST_HEADER_BYTES} are read")
        return safetensors.torch.load(bytes(content))
    except FileNotFoundError:
        if (folder / PICKLE_FILE).exists():
            raise Flaw(
                f"it has {PICKLE_FILE}, a pickle, which could run any code: save it as {WEIGHTS_FILE}"
                " (save_pretrained(safe_serialization=True))"
            ) from None
        raise Flaw(f"it has no {WEIGHTS_FILE}: save the adapter there as one file") from None
    except Flaw:
        raise
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise Flaw(
            f"{WEIGHTS_FILE} is truncated or no safetensors file ({error}): copy or save it again"
        ) from error


def _check_tensor(tensor_name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _SERVED_DTYPES:
        raise Flaw(f"{short(tensor_name)} is {tensor.dtype}: save it as float32, float16 or bfloat16")
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise Flaw(
            f"{tensor_name} has shape {tuple(tensor.shape)}, not two dimensions above 0: gather the shards of a"
            " distributed training before saving"
        )


def _pair(name: TensorName, sides: Mapping[str, Tensor]) -> _Pair:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in sides:
            raise Flaw(f"{WEIGHTS_FILE} has lora_{other} of {name.path} without lora_{side}: save it again")
    return _Pair(name.path, name.layer, name.site, sides["A"], sides["B"])


def _check_targets(settings: LoraSettings, pairs: Mapping[str, _Pair], base: BaseShape) -> None:
    """The modules of the file must be exactly the modules that the configuration targets in this base."""
    for path, pair in pairs.items():
        if pair.layer >= base.num_layers:
            raise Flaw(
                f"{path} is beyond the base model's {base.num_layers} layers: it was trained on another"
            )
        tied = settings.ties and path == "lm_head" and settings.targets("model.embed_tokens")
        if not settings.targets(path) and not tied:
            raise Flaw(
                f"{WEIGHTS_FILE} has {path}, which {CONFIG_FILE} does not target: one of them is wrong"
            )
    headless = any(path.startswith(("layers.", "embed_tokens")) for path in pairs)
    paths = module_paths(base.num_layers, "" if headless else "model.")
    for path in paths:
        if path not in pairs and settings.targets(path):
            raise Flaw(f"{CONFIG_FILE} targets {path}, of which {WEIGHTS_FILE} has no tensors: save it again")
    ends = {
        path[start:] for path in paths for start in range(len(path)) if not start or path[start - 1] == "."
    }
    for target in settings.target_modules if isinstance(settings.target_modules, frozenset) else ():
        if target not in ends:
            raise Flaw(
                f"{CONFIG_FILE} has {short(target)} in target_modules, which names no served module of this base"
                f" model (sites: {', '.join((*SITES, *OUTER_SITES))}): train without it, or remove it if it never"
                " matched"
            )


def _check_activation(settings: LoraSettings, pairs: Mapping[str, _Pair]) -> None:
    for path, pair in pairs.items():
        if settings.invocation and pair.site == "embed_tokens":
            raise Flaw(
                f"{CONFIG_FILE} sets {INVOCATION_FIELD} and {WEIGHTS_FILE} has {path}: an activated LoRA on the"
                " embedding is not served; train without embed_tokens in target_modules, or without the invocation"
            )


def _check_shapes(settings: LoraSettings, pair: _Pair, base: BaseShape) -> None:
    shape, rank = base.of(pair.site), settings.rank(pair.path)
    ranks = pair.A.shape[0], pair.B.shape[1]
    if ranks != (rank, rank):
        raise Flaw(
            f"{pair.path} has rank {ranks[0]} in lora_A and {ranks[1]} in lora_B, but r and rank_pattern of"
            f" {CONFIG_FILE} say {rank}: save both together"
        )
    trained = pair.A.shape[1], pair.B.shape[0]
    if trained != (shape.in_features, shape.out_features):
        raise Flaw(
            f"{pair.path} maps {trained[0]} to {trained[1]} features, the base model's {shape.in_features} to"
            f" {shape.out_features}: it was trained on another base model"
        )


def _check_update(pair: _Pair, scale: float, dtype: torch.dtype) -> None:
    """Refuse an update that overflows for any ordinary input: numbers of size 1, as a normalisation gives them.

    For these A x is about as large as A's rows are long, and B (A x) as the rows of B A are. An embedding's input is
    one token, so that A x is a column of A.
    """
    most = torch.finfo(dtype if dtype.itemsize > 1 else torch.float32).max
    largest_A, largest_B = (side.abs().max().item() for side in (pair.A, pair.B))
    embeds = pair.site == "embed_tokens"
    bound = largest_A * (1 if embeds else pair.A.shape[1]) * max(1.0, abs(scale))
    if bound <= most and bound * largest_B * pair.A.shape[0] <= min(most, _MOST_UPDATE):
        return
    A, B = pair.A.double(), pair.B.double()
    if embeds:
        shrunk = largest_A
        expanded = abs(scale) * max((B @ part).abs().max().item() for part in torch.split(A, 4096, dim=1))
    else:
        shrunk = math.sqrt((A * A).sum(dim=1).max().item())
        products = (B @ (A @ A.T) * B).sum(dim=1).clamp(min=0)
        expanded = abs(scale) * math.sqrt(products.max().item())
    # What reads the sum squares it in float32: the next norm, or the scores.
    if shrunk * max(1.0, abs(scale)) > most or expanded > min(most, _MOST_UPDATE):
        raise Flaw(
            f"{pair.path} changes ordinary inputs by about {expanded:.2g} (lora_alpha / rank is {scale:.2g}), beyond"
            f" what {dtype} can compute with: check lora_alpha and the training, or serve it in a wider dtype"
        )


def _in_steps(pair: _Pair, dtype: torch.dtype) -> _Pair:
    """For a dtype of a byte, both matrices divided so that their largest elements are the dtype's largest number."""
    if dtype.itemsize > 1:
        return pair
    most = torch.finfo(dtype).max
    a_step, b_step = (float(side.float().abs().max()) / most or 1.0 for side in (pair.A, pair.B))
    return replace(pair, A=pair.A.float() / a_step, B=pair.B.float() / b_step, step=a_step * b_step)


def _fill(layout: PackedLayout, pairs: Mapping[tuple[int, str], _Pair]) -> Tensor:
    """The packed form's bytes; gaps between matrices are zero, so that equal content has equal bytes."""
    rows = torch.zeros(layout.nbytes, dtype=torch.uint8)
    elements = rows.view(layout.dtype)
    for place in layout.places:
        a_start = place.a_start
        for module, bt_start in zip(place.modules, place.bt_starts, strict=True):
            pair = pairs[module.layer, module.site]
            matrix(elements, a_start, (module.rank, pair.A.shape[1])).copy_(pair.A)
            matrix(elements, bt_start, (module.rank, pair.B.shape[0])).copy_(pair.B.to(layout.dtype).t())
            a_start += pair.A.numel()
    # One sum finds any NaN or Inf at the speed of reading; which tensor it is matters only then.
    summed = (
        elements.float() if layout.dtype.itemsize == 1 else elements
    )  # there are no sums of bytes' floats
    if not summed.sum().isfinite():
        for pair in pairs.values():
            _check_finite(pair, layout.dtype)
    return rows


def _check_finite(pair: _Pair, dtype: torch.dtype) -> None:
    for side, tensor in (("A", pair.A), ("B", pair.B)):
        if not tensor.isfinite().all():
            raise Flaw(
                f"lora_{side} of {pair.path} holds NaN or Inf: the training diverged; use another step"
            )
        if not tensor.to(dtype).float().isfinite().all():
            raise Flaw(f"lora_{side} of {pair.path} has values beyond {dtype}'s range: serve it in float32")
