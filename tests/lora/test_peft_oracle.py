"""Every form of PEFT folder that is served means here what it means to PEFT: the same change of every weight."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lora.format.packed import view
from lora.format.peft import PackedAdapter, pack
from lora.target_modules import SITES, SiteGroup
from tests.oracles.adapters import TINY, base_shape, deltas, module_path, peft_model

pytestmark = [
    # PEFT still reads a property that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # Keys that match nothing are among the forms.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

BASE = base_shape()

FORMS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "every-site": {"target_modules": list(SITES), "r": 5, "lora_alpha": 7},
    "all-linear": {"target_modules": "all-linear", "r": 24},
    "all-linear-but": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "down_proj"]},
    "regex": {"target_modules": r".*\.layers\.[02]\.(self_attn\.[qo]_proj|mlp\.up_proj)"},
    "full-paths": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]},
    "exclude-regex": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.1\..*"},
    "one-layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "some-layers": {"target_modules": ["k_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "some-layers-list": {
        "target_modules": ["k_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["h", "layers"],
    },
    "path-beats-layers": {
        "target_modules": ["model.layers.1.mlp.up_proj", "q_proj"],
        "layers_to_transform": [0],
    },
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 16, "lora_alpha": 8},
    "rank-pattern": {
        "target_modules": list(SITES),
        "rank_pattern": {r"layers\.1\..*": 9, "proj": 2, "q_proj": 3},
    },
    "alpha-pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {r"^model\.layers\.2.*": 1.5}},
    "anchored": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "^q_proj": 7},
    },
    "both-patterns-rslora": {
        "target_modules": ["gate_proj", "up_proj", "o_proj"],
        "use_rslora": True,
        "rank_pattern": {"up_proj": 6, "layers.2.mlp.gate_proj": 1},
        "alpha_pattern": {"gate_proj": 3, "up_proj": 40},
    },
    "head": {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 3}},
    "head-alone": {"target_modules": ["lm_head"], "layers_to_transform": [1]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 3}},
    "embedding-alone": {"target_modules": ["model.embed_tokens"], "layers_to_transform": [1]},
    "both-ends-rslora": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True, "r": 5},
    "ends-by-regex": {"target_modules": r".*embed_tokens|.*\.0\..*q_proj", "exclude_modules": ["v_proj"]},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "training-only": {"target_modules": ["q_proj"], "lora_dropout": 0.3, "task_type": "CAUSAL_LM"},
}


def packed_deltas(packed: PackedAdapter) -> dict[str, Tensor]:
    """scale * B A of every module, from the packed form's views alone: [out, in] float32."""
    found: dict[str, Tensor] = {}
    for (layer, group), weights in view(packed.rows, packed.layout, packed.ref.digest).groups.items():
        for part in weights.parts:
            rank_rows = slice(part.rank_start, part.rank_stop)
            scaled = weights.scale[rank_rows, None] * weights.A[rank_rows].float()
            found[module_path(layer, _site_at(group, part.out_start))] = part.Bt.float().t() @ scaled
    return found


def _site_at(group: SiteGroup, out_start: int) -> str:
    starts, end = {}, 0
    for site in group.sites:
        starts[end] = site
        end += BASE.of(site).out_features
    return starts[out_start]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    for path, delta in theirs.items():
        torch.testing.assert_close(ours[path], delta, rtol=rtol, atol=rtol * float(delta.abs().max()))


@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_change_the_base_as_peft_does(form: str, tmp_path: Path) -> None:
    model = peft_model(peft.LoraConfig(**FORMS[form]), seed=7)
    model.save_pretrained(str(tmp_path))
    packed = pack("a", tmp_path, BASE, torch.float32)
    # PEFT's own reading of the folder is the oracle: saving sorts the patterns, whose first match counts.
    again = peft.PeftModel.from_pretrained(LlamaForCausalLM(TINY), tmp_path)
    assert_same(packed_deltas(packed), deltas(again), rtol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_ends_of_a_tied_base_change_as_peft_changes_them(
    targets: list[str], ties: bool, tmp_path: Path
) -> None:
    """The other end stays as it is, unless the training tied the adapters too."""
    tied = LlamaConfig(**(TINY.to_dict() | {"tie_word_embeddings": True}))
    config = peft.LoraConfig(target_modules=targets, r=5, ensure_weight_tying=ties)
    peft_model(config, seed=3, base=tied).save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(LlamaForCausalLM(tied), tmp_path)
    ours = packed_deltas(pack("a", tmp_path, BASE, torch.float32))
    assert_same(ours, deltas(again), rtol=1e-6)
    assert ("lm_head" in ours, "model.embed_tokens" in ours) == (
        ties or "lm_head" in targets,
        ties or "embed_tokens" in targets,
    )


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_rounds_each_matrix_once(dtype: torch.dtype, rtol: float, tmp_path: Path) -> None:
    model = peft_model(peft.LoraConfig(target_modules="all-linear", r=6), seed=3)
    model.save_pretrained(str(tmp_path))
    packed = pack("a", tmp_path, BASE, dtype)
    assert packed.layout.dtype == dtype
    assert_same(packed_deltas(packed), deltas(model), rtol)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_a_headless_base_names_its_modules_without_the_root(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(LlamaModel(TINY), config)
    assert isinstance(model, peft.PeftModel)
    model.save_pretrained(str(tmp_path))
    packed = pack("a", tmp_path, BASE, torch.float32)
    theirs = {f"model.{path}": delta for path, delta in deltas(model).items()}
    assert_same(packed_deltas(packed), theirs, rtol=1e-6)
