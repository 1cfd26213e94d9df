"""What cannot be computed as asked is refused before anything is read, by field, value and remedy."""

from dataclasses import replace

import pytest
import torch

from engine.base import base_model
from engine.base.base_model import choose_base, device_of
from engine.config.config import Device, EngineConfig
from engine.config.peer_config import PeerConfig
from engine.errors import InvalidConfig
from model.config import Quantization
from model.parallel import Shard
from transport.base import Address

CPU = EngineConfig(device="cpu")


def refusal(config: EngineConfig) -> str:
    with pytest.raises(InvalidConfig) as refused:
        choose_base(config)
    return str(refused.value)


def test_the_first_part_is_this_devices() -> None:
    base = choose_base(replace(CPU, tensor_parallel_size=2, quantization="int8"))
    assert (base.form.shard, base.form.quantization) == (Shard(0, 2), "int8")
    assert base.part.num_heads * 2 == base.config.num_heads
    assert [len(cut.of("q_proj").outputs) * 2 for cut in base.shard_specs()] == [base.config.q_size] * 2
    assert device_of(base.device, 1) == torch.device("cpu")
    assert device_of(torch.device("cuda"), 1) == torch.device("cuda", 1)


def test_a_size_that_divides_no_heads_is_refused() -> None:
    told = refusal(replace(CPU, tensor_parallel_size=3))
    assert told.startswith(
        "tensor_parallel_size=3 is not accepted: the model (4 heads, 2 key-value heads, 384"
    )
    assert "can be cut into 1, 2, 4 parts" in told


def test_peers_and_parts_exclude_each_other() -> None:
    peers = PeerConfig(listen=Address("127.0.0.1", 0), token="t" * 16, plain=True)
    assert "no peers" in refusal(replace(CPU, tensor_parallel_size=2, peers=peers))


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


@pytest.mark.usefixtures("one_gpu")
def test_more_parts_than_devices_are_refused() -> None:
    told = refusal(replace(CPU, device="cuda", tensor_parallel_size=2))
    assert told == "tensor_parallel_size=2 is not accepted: torch sees 1 CUDA devices: give at most that many"


@pytest.mark.usefixtures("one_gpu")
def test_parts_too_narrow_for_fp8_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model's down projection has 384 inputs: 96 in each of 4 parts."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = replace(CPU, device="cuda", dtype="bfloat16", quantization="fp8")
    assert choose_base(config).form.quantization == "fp8"
    monkeypatch.setattr(base_model, "_FP8_STEP", 64)
    told = refusal(replace(config, tensor_parallel_size=4))
    assert told.startswith("quantization='fp8' is not accepted: a matrix of this device has a side of ")
    assert told.endswith("fp8 products need multiples of 64: use none")


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("device", "form", "remedy"),
    [
        ("cpu", "fp8", "use int8 or none"),
        ("cuda", "fp8", "before sm_89"),
        ("cuda", "int8", "use fp8 or none"),
    ],
)
def test_a_form_that_the_device_has_not_is_refused(device: Device, form: Quantization, remedy: str) -> None:
    told = refusal(replace(CPU, device=device, quantization=form))
    assert told.startswith(f"quantization='{form}' is not accepted")
    assert remedy in told
