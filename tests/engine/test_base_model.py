"""What of the base model is chosen before anything is read, and what is refused then."""

import pytest

from engine.base_model import choose
from engine.config import EngineConfig
from engine.errors import InvalidConfig


@pytest.mark.parametrize(("asked", "chosen"), [("auto", "torch"), ("torch", "torch")])
def test_the_attention_backend_is_chosen_at_once(asked: str, chosen: str) -> None:
    assert choose(EngineConfig(device="cpu", attention_backend=asked)).attention == chosen


@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_a_backend_that_cannot_attend_here_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidConfig, match=r"attention_backend.*CUDA device"):
        choose(EngineConfig(device="cpu", attention_backend=name))
