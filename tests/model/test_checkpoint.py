"""Finding and reading checkpoints; every fault of the files is named."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from model.checkpoint import expected_tensors, load_weights, serving_dtype, torch_dtype
from model.checkpoint_files import CheckpointError, find_checkpoint, read_config, weights_digest
from model.weights import Weights
from tests.model.driver import CPU, Driver
from tests.oracles import hf

PROMPT = [5, 9, 200, 31, 77, 8]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf.save(hf.build("llama-3"), tmp_path)


def load(folder: Path) -> Weights:
    return load_weights(folder, read_config(folder), torch.float32, CPU, progress=False)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_shards_are_the_same_model_as_one_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sharded = hf.save(hf.build("llama-3"), tmp_path_factory.mktemp("sharded"), shard_bytes=60_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(Driver(sharded).logits(PROMPT), Driver(folder).logits(PROMPT))


def test_expected_tensors_are_what_transformers_writes(folder: Path) -> None:
    written = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert expected_tensors(read_config(folder)) == written


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.masked", "score.weight", "extra"]
)
def test_tensors_that_nothing_computes_with_are_passed_over(folder: Path, name: str) -> None:
    before = Driver(folder).logits(PROMPT)
    rewrite(folder, lambda t: t.update({name: torch.ones(8)}))
    assert torch.equal(Driver(folder).logits(PROMPT), before)


def test_a_head_in_the_file_counts_though_the_config_calls_it_tied(tmp_path: Path) -> None:
    folder = hf.save(hf.build("llama-3.2-tied"), tmp_path)
    tied = Driver(folder).logits(PROMPT)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(Driver(folder).logits(PROMPT), tied)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0)}))
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    ours = Driver(folder).logits(PROMPT)
    assert torch.allclose(ours, hf.logits(theirs, PROMPT), atol=1e-3)
    assert not torch.allclose(ours, tied, atol=1e-1)


def test_a_tied_models_own_head_must_fit(tmp_path: Path) -> None:
    folder = hf.save(hf.build("llama-3.2-tied"), tmp_path)
    rewrite(folder, lambda t: t.update({"lm_head.weight": torch.zeros(5, 64)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \(5, 64\)"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_no_plain_numbers_are_named(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{name} holds "):
        load(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, name: str, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][-1] = value

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        load(folder)


def test_weights_beyond_the_serving_dtype_are_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.full((64,), 1e6)}))
    load(folder)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinity in float16"):
        load_weights(folder, read_config(folder), torch.float16, CPU, progress=False)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": {"a": "../b.safetensors"}}]
)
def test_an_index_that_names_no_files_of_the_folder_is_refused(
    folder: Path, index: dict[str, object]
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="needs a weight_map"):
        load(folder)


def test_missing_extra_and_misshaped_tensors_are_all_named(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.norm.weight"] = torch.zeros(63)

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for fault in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight is (63,), not (64,)",
    ):
        assert fault in str(error.value)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' cannot be read"):
        load(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors' cannot be read"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is a pickle.*convert the weights to safetensors"
    ):
        load(folder)


def test_config_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        read_config(tmp_path)


def test_a_folder_is_itself_and_a_path_is_never_a_hub_name(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path)) == tmp_path
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            find_checkpoint(name)


def test_a_hub_name_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="scripts/setup hub"):
        find_checkpoint("some/model")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(model: str, **_: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("offline and not cached")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"some/model.*not fetched from the hub: offline and not cached"
    ):
        find_checkpoint("some/model")


def test_a_hub_name_becomes_its_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda model, **_: str(tmp_path / model))
    assert find_checkpoint("some/model") == tmp_path / "some/model"


def test_the_serving_dtype_is_asked_for_or_the_checkpoints(folder: Path) -> None:
    config = read_config(folder)
    assert serving_dtype(config, "auto", CPU) == torch_dtype(config.dtype) == torch.float32
    assert serving_dtype(config, "bfloat16", CPU) == torch.bfloat16
    half = replace(config, dtype="float16")
    assert serving_dtype(half, "auto", CPU) == torch.float32
    assert serving_dtype(half, "float16", CPU) == torch.float16
    assert serving_dtype(half, "bfloat16", CPU) == torch.bfloat16
    assert serving_dtype(half, "auto", torch.device("cuda")) == torch.float16


def test_loading_shows_its_progress_unless_told_not_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(folder)
    assert capsys.readouterr().err == ""
    load_weights(folder, read_config(folder), torch.float32, CPU)
    assert "Loading weights" in capsys.readouterr().err


def test_checkpoints_with_different_weights_have_different_digests(tmp_path: Path) -> None:
    digests: list[str] = []
    for number, seed in enumerate((1, 1, 2)):
        rows = torch.randn(1000, 300, generator=torch.Generator().manual_seed(seed))
        made = tmp_path / str(number)
        made.mkdir()
        save_file({"rows": rows}, made / "model.safetensors")
        digests.append(weights_digest(made))
    assert digests[0] == digests[1] != digests[2]
