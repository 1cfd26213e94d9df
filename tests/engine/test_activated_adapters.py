"""Activated LoRAs in an engine: how they are tried, and what is said where a prompt has no invocation."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.assembly.self_test import SelfTest
from engine.demo.embedded import adapter_folders
from lora.errors import AdapterRefused

INVOCATION = (11, 12)
GREEDY = SamplingParams(temperature=0, max_tokens=4)


def activated(folder: Path, invocation: object = INVOCATION) -> Path:
    """Copy an embedded adapter, to act from its invocation on."""
    shutil.copytree(adapter_folders()["reverse"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": invocation}))
    return folder


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    llm = LLM(loras={"late": activated(tmp_path / "late")}, max_model_len=64, kv_cache_bytes=1 << 20)
    yield llm
    assert llm.engine.core.num_live_requests == llm.engine.core.block_stats().used == 0
    llm.close()


def test_its_trial_has_the_invocation(llm: LLM) -> None:
    effects = {entry.name: entry.effect for entry in llm.engine.store.registry.entries()}
    assert effects["late"] == "some"


def test_a_prompt_without_the_invocation_is_the_bases_and_that_is_said_once(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [(20, 21, 22), (20, 21, 22), (20, 11, 22)]
    late, base = llm.generate(prompts, GREEDY, "late"), llm.generate(prompts, GREEDY)
    assert [each.outputs[0].token_ids for each in late] == [each.outputs[0].token_ids for each in base]
    told = [each.getMessage() for each in caplog.records if "no invocation" in each.getMessage()]
    assert len(told) == 1
    assert "late (token ids [11, 12]): the base model answers alone" in told[0]
    llm.generate([(20, *INVOCATION)], GREEDY, "late")
    assert [each.adapters for each in llm.engine.core.history.last()].count(1) > 0


def test_an_invocation_that_no_prompt_can_have_is_refused(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"'far'.*alora_invocation_tokens has 99999"):
        llm.engine.store.registry.load("far", activated(tmp_path / "far", [99999]))
    ref = llm.engine.store.registry.resolve("late")
    card = llm.engine.card
    trial = SelfTest(llm.engine.core, llm.engine.changed, card.vocab_size, card.max_model_len)
    for invocation in ((card.vocab_size,), (11,) * card.max_model_len):  # as a peer might tell
        with pytest.raises(AdapterRefused, match="no prompt can have its invocation"):
            trial(replace(ref, digest="0" * 64, invocation=invocation), waits=True)
