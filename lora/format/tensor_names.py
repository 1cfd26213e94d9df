"""Read the names that PEFT gives tensors: which module they belong to, and which are not served. Knows no numbers."""

import re
from dataclasses import dataclass

from lora.format.adapter_files import WEIGHTS_FILE, Flaw, short
from lora.target_modules import OUTER_SITES, SITES, SiteGroup

_BLOCKS = {
    **dict.fromkeys((*SiteGroup.GATE_UP.sites, *SiteGroup.DOWN.sites), "mlp"),
    **dict.fromkeys((*SiteGroup.QKV.sites, *SiteGroup.OUT.sites), "self_attn"),
}
_PREFIX = r"(?:base_model\.model\.)?"
_IN_LAYER = re.compile(
    rf"{_PREFIX}"
    r"(?P<path>(?P<root>(?:model\.)?)layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<block>\w+)\.(?P<site>\w+))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_HEAD = re.compile(rf"{_PREFIX}(?P<path>lm_head)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_EMBEDDING = re.compile(
    rf"{_PREFIX}(?P<path>(?P<root>(?:model\.)?)embed_tokens)\.lora_embedding_(?P<side>[AB])(?:\.default)?"
)
_BASE_COPY = re.compile(rf"{_PREFIX}(?:model\.)?(?P<site>embed_tokens|lm_head)\.base_layer\.weight")
_OTHER_TENSORS = (
    ("embed_tokens", "a new embedding is not served: train a LoRA on it, by target_modules"),
    ("lm_head", "a new lm_head is not served: train a LoRA on it, by target_modules"),
    (
        "lora_magnitude_vector",
        "it belongs to DoRA, which is not served: merge the adapter into the base model",
    ),
    (".bias", "biases are not served: train with bias='none' and lora_bias=False"),
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """Side "A" or "B" of the module at `path`, which is at `site` of `layer`, 0 for a site outside the layers.

    `root` is what the path of a layer's module, or of the embedding, begins with: "model." or "". None for the head.
    """

    path: str
    root: str | None
    layer: int
    site: str
    side: str


def parse_tensor_name(name: str) -> TensorName:
    """Read the name of a LoRA's tensor. Raises Flaw for one that is not served."""
    if (head := _HEAD.fullmatch(name)) is not None:
        return TensorName(head["path"], None, 0, "lm_head", head["side"])
    if (outside := _EMBEDDING.fullmatch(name)) is not None:
        return TensorName(outside["path"], outside["root"], 0, "embed_tokens", outside["side"])
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        for mark, reason in _OTHER_TENSORS:
            if mark in name:
                raise Flaw(f"{WEIGHTS_FILE} has the tensor {short(name)}: {reason}")
        raise Flaw(
            f"{WEIGHTS_FILE} has the tensor {short(name)}, which is no LoRA of a Llama-family model:"
            " expected [base_model.model.][model.]layers.N.{self_attn,mlp}.SITE.lora_{A,B}.weight"
        )
    if _BLOCKS.get(match["site"]) != match["block"]:
        raise Flaw(
            f"{WEIGHTS_FILE} has the tensor {short(name)}: {match['block']}.{match['site']} is no served"
            f" module; the sites are {', '.join((*(f'{_BLOCKS[site]}.{site}' for site in SITES), *OUTER_SITES))}"
        )
    return TensorName(match["path"], match["root"], int(match["layer"]), match["site"], match["side"])


def copied_site(name: str) -> str | None:
    """Return the site outside the layers whose base weight this is; None of any other tensor.

    PEFT saves these beside a LoRA on them, though the training leaves them as they are.
    """
    match = _BASE_COPY.fullmatch(name)
    return match["site"] if match else None


def module_paths(num_layers: int, root: str) -> list[str]:
    """List the paths of all modules that are served, of a model whose layers are below `root`.

    A model whose root is not "model." is one without a head.
    """
    layers = [f"{root}layers.{layer}.{_BLOCKS[site]}.{site}" for layer in range(num_layers) for site in SITES]
    return [*layers, f"{root}embed_tokens", *(["lm_head"] if root else [])]
