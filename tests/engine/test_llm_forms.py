"""What LLM takes as vLLM's LLM does, and that a call that fails or is interrupted leaves nothing behind."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, LoRARequest, SamplingParams
from engine.demo.embedded import adapter_folders
from engine.errors import InvalidConfig
from engine.step_result import StepResult
from engine.tokenizer import PromptTooLong
from lora.errors import AdapterRefused, UnknownAdapter
from scheduler.request import InvalidParameter
from tests.engine.demo_llm import ASK, GREEDY, said


@dataclass(frozen=True)
class ForeignRequest:
    """What another library calls an adapter."""

    lora_name: str
    path: str


def test_an_adapter_is_read_from_its_request_when_it_is_first_used(llm: LLM) -> None:
    upper, rot13 = (adapter_folders()[name] for name in ("upper", "rot13"))
    mine, foreign = LoRARequest("mine", 1, str(upper)), ForeignRequest("theirs", str(rot13))
    requests: Any = [mine, foreign, None, LoRARequest("reverse")]
    assert said(llm.chat([ASK] * 4, GREEDY, lora_request=requests)) == [
        "GARDEN",
        "tneqra",
        "garden",
        "nedrag",
    ]
    loads = llm.engine.store.stats().loads
    assert said(llm.chat([ASK], sampling_params=GREEDY, lora_request=mine)) == ["GARDEN"]
    assert said(llm.chat([ASK], GREEDY, adapters="mine")) == ["GARDEN"]
    assert llm.engine.store.stats().loads == loads
    assert said(llm.chat([ASK], GREEDY, lora_request=LoRARequest("mine", 1, rot13))) == ["tneqra"]


def test_a_call_may_ask_for_more_sequences_than_a_server_lets_wait(llm: LLM) -> None:
    results = llm.generate(["a"] * 3, SamplingParams(n=100, max_tokens=1))
    assert [len(result.outputs) for result in results] == [100] * 3


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        (
            {"lora_request": LoRARequest("a b", 1, "x")},
            AdapterRefused,
            "choose another name",
        ),
        ({"lora_request": "reverse"}, InvalidParameter, r"^lora_request\[0\]"),
        ({"lora_request": LoRARequest("new", 1, "/nowhere")}, AdapterRefused, "'new' is refused"),
        ({"lora_request": LoRARequest("new")}, UnknownAdapter, "'new'"),
        (
            {"lora_request": LoRARequest("reverse"), "adapters": "reverse"},
            InvalidParameter,
            "adapters is given too",
        ),
        ({"adapters": 5}, InvalidParameter, r"^adapters\[0\]=5"),
        ({"adapters": ["reverse"] * 2}, ValueError, "adapters has 2 entries for 1 prompts"),
        ({"params": {"temperature": 0}}, InvalidParameter, r"^params"),
        ({"params": GREEDY, "sampling_params": GREEDY}, InvalidParameter, "params is given too"),
    ],
    ids=str,
)
def test_what_is_no_choice_is_refused_by_its_place(
    llm: LLM, choice: Any, error: type[Exception], message: str
) -> None:
    steps = llm.engine.core.steps
    with pytest.raises(error, match=message):
        llm.generate("garden", **choice)
    assert llm.engine.core.steps == steps


def test_one_name_has_one_folder_in_a_call(llm: LLM) -> None:
    folders = list(adapter_folders().values())
    both = [LoRARequest("two", 1, folder) for folder in folders[:2]]
    with pytest.raises(InvalidParameter, match=r"^lora_request\[1\].*another folder"):
        llm.generate(["a", "b"], GREEDY, lora_request=both)


def test_token_ids_alone_are_one_prompt(llm: LLM) -> None:
    token_ids = list(llm.tokenizer.encode("garden"))
    (result,) = llm.generate(token_ids, GREEDY)
    assert result.prompt_token_ids == tuple(token_ids)


@pytest.mark.parametrize(
    "prompt", [[9999], [-1], [], "x" * 10_000, [1] * 128], ids=lambda prompt: str(prompt)[:9]
)
def test_a_prompt_that_cannot_run_is_named_before_anything_runs(llm: LLM, prompt: Any) -> None:
    steps = llm.engine.core.steps
    with pytest.raises(Exception, match=r"^prompts\[1\]"):
        llm.generate(["garden", prompt], GREEDY)
    assert llm.engine.core.steps == steps
    assert llm.engine.core.num_live_requests == 0


def test_a_conversation_that_cannot_run_is_named(llm: LLM) -> None:
    long: Any = [{"role": "user", "content": "x" * 10_000}]
    with pytest.raises(PromptTooLong, match=r"^conversations\[1\]"):
        llm.chat([ASK, long], GREEDY)


def test_progress_is_shown_only_on_a_terminal_or_if_asked_for(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate("garden", GREEDY)
    assert capsys.readouterr().err == ""
    llm.generate(["garden"] * 3, GREEDY, use_tqdm=True)
    assert "3/3" in capsys.readouterr().err


def test_an_interruption_waits_for_the_step_and_leaves_the_engine_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, finished = llm.engine.core.step, []

    def interrupted() -> StepResult:
        os.kill(os.getpid(), signal.SIGINT)
        result = step()
        finished.append(result)
        return result

    monkeypatch.setattr(llm.engine.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["garden"] * 3, GREEDY)
    assert len(finished) == 1
    monkeypatch.undo()
    assert llm.engine.core.num_live_requests == 0
    assert llm.engine.core.block_stats().used == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert said(llm.chat([ASK], GREEDY)) == ["garden"]


def test_options_are_judged_as_on_the_command_line() -> None:
    options: Any = {"kv_cach_bytes": 1}
    with pytest.raises(TypeError, match="did you mean kv_cache_bytes"):
        LLM(**options)
    for wrong, field in (
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"kv_cache_bytes": "lots"}, "kv_cache_bytes='lots'"),
        ({"lora_dir": "/nowhere"}, "lora_dir="),
        ({"max_num_seqs": "3"}, "max_num_seqs='3'"),
        ({"cuda_graphs": "perhaps"}, "cuda_graphs="),
        ({"dtype": 5}, "dtype=5"),
    ):
        options = wrong
        with pytest.raises(InvalidConfig, match=field):
            LLM(**options)


@pytest.mark.slow
def test_a_folder_of_adapters_may_be_a_text_and_what_is_closed_says_so() -> None:
    folder: Any = str(Path(adapter_folders()["upper"]).parent)
    options: Any = {"kv_cache_bytes": "1MiB", "lora_dir": folder}
    with LLM(max_model_len=32, **options) as made:
        assert "upper" in made.engine.store.registry.names()
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        made.generate("garden")
