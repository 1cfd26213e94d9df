"""An adapter that was trained with other tokens than the base's is refused; its own template and ends are honoured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from engine import LLM, SamplingParams
from engine.assembly.tokenizer_loading import load_tokenizer
from engine.demo.embedded import DEMO_BASE, adapter_folders
from engine.text.vocabulary_check import check_vocabulary
from engine.tokenizer import Tokenizer
from lora.errors import AdapterRefused
from lora.format.adapter_files import Flaw
from lora.format.companions import Companions, Vocabulary
from tests.engine.text.templates import HOSTILE
from tests.fakes.tokenizers import BOS, EOS, byte_tokenizer, merging_tokenizer

MERGING = merging_tokenizer()
BACKEND: RawTokenizer = MERGING._backend
HI = [{"role": "user", "content": "hi"}]


def content(change: Callable[[dict[str, Any]], object] = lambda written: None) -> bytes:
    """The tokenizer.json of the merging tokenizer, with a change."""
    written = json.loads(BACKEND.to_str())
    change(written)
    return json.dumps(written).encode()


def lowercase() -> bytes:
    changed = RawTokenizer.from_str(BACKEND.to_str())
    changed.normalizer = normalizers.Lowercase()
    return changed.to_str().encode()


def added(text: str, token_id: int) -> Callable[[dict[str, Any]], object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return lambda written: written["added_tokens"].append({"id": token_id, "content": text, **flags})


def endless() -> bytes:
    changed = RawTokenizer.from_str(BACKEND.to_str())
    splits = pre_tokenizers.Split(Regex("(([a-z ])*)*$Q"), "isolated")
    changed.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel()])
    return changed.to_str().encode()


NEXT = BACKEND.get_vocab_size()


@pytest.mark.parametrize(
    "vocabulary",
    [
        Vocabulary(),
        Vocabulary(tokenizer=content()),
        Vocabulary((("a", BACKEND.token_to_id("a")),)),
        Vocabulary((("[PAD]", NEXT),), content(added("[PAD]", NEXT)), "[PAD]"),
        Vocabulary(tokenizer=content(lambda written: written.update(padding=None, truncation=None))),
    ],
)
def test_the_same_tokens_are_taken_and_padding_that_no_text_has(vocabulary: Vocabulary) -> None:
    check_vocabulary(BACKEND, vocabulary)


@pytest.mark.parametrize(
    ("vocabulary", "reason"),
    [
        (Vocabulary((("<|new|>", NEXT),)), "<|new|>.*lacks"),
        (Vocabulary((("a", 5),)), "'a'.*has as"),
        (Vocabulary((("a", 5),), None, "a"), "'a'.*has as"),
        (Vocabulary(tokenizer=content(added("<|new|>", NEXT))), "<|new|>.*lacks"),
        (Vocabulary(tokenizer=content(lambda written: written["model"]["merges"].reverse())), "other tokens"),
        (
            Vocabulary(tokenizer=content(lambda written: written["model"]["vocab"].popitem())),
            "tokenizer.json",
        ),
        (Vocabulary(tokenizer=lowercase()), "other tokens"),
        (Vocabulary(tokenizer=endless()), "other patterns"),
        (Vocabulary(tokenizer=b"{}"), "cannot be read"),
        (Vocabulary(tokenizer=b"\xff"), "cannot be read"),
    ],
)
def test_other_tokens_are_refused_by_name(vocabulary: Vocabulary, reason: str) -> None:
    with pytest.raises(Flaw, match=reason.replace("|", r"\|")):
        check_vocabulary(BACKEND, vocabulary)


def test_an_invocation_of_tokens_that_the_base_lacks_is_refused_by_name() -> None:
    base = Tokenizer(byte_tokenizer())
    base.check_adapter(Companions(), Vocabulary(invocation=(0, 257)))
    with pytest.raises(Flaw, match=r"alora_invocation_tokens has 300, which is no token"):
        base.check_adapter(Companions(), Vocabulary(invocation=(0, 300)))


def test_an_adapters_template_and_end_tokens_are_its_own() -> None:
    base = Tokenizer(byte_tokenizer())
    letter, *_ = base.encode("x", add_special=False)
    (end,), (begin,) = base.encode(EOS, add_special=False), base.encode(BOS, add_special=False)
    own = base.of_adapter(Companions("{{ messages[0].content }}{{ eos_token }}", BOS, (letter,)))
    assert own.encode_chat(HI) == (*base.encode("hi", add_special=False), begin)
    assert own.eos_token_ids == (end, letter, begin)
    assert base.eos_token_ids == (end,)
    assert base.decode(base.encode_chat(HI)).startswith("user: hi")
    assert base.of_adapter(Companions()) is base


@pytest.mark.parametrize(
    ("companions", "reason"),
    [
        (Companions("{% for"), "no Jinja template"),
        (Companions(HOSTILE["a long range"]), "no template may"),
        (Companions(eos_token="<|new|>"), "eos_token '<\\|new\\|>' is no token"),
        (Companions(eos_token_ids=(99999,)), "eos_token_id 99999"),
    ],
)
def test_companions_that_cannot_be_served_are_refused(companions: Companions, reason: str) -> None:
    with pytest.raises(Flaw, match=reason):
        Tokenizer(byte_tokenizer()).check_adapter(companions, Vocabulary())


def test_an_engine_asks_an_adapter_by_its_template_and_ends_with_its_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(adapter_folders()["reverse"], folder)
    shutil.copy(DEMO_BASE / "tokenizer.json", folder)
    base = load_tokenizer(DEMO_BASE)
    (end,) = base.encode("d", add_special=False)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    llm = LLM(max_model_len=64, kv_cache_bytes=1 << 20, lora_dir=tmp_path)
    ask = [{"role": "user", "content": "garden"}]
    by_base = llm.chat([ask, ask], SamplingParams(temperature=0), adapters=["reverse", "own"])
    assert [result.outputs[0].text for result in by_base] == ["nedrag", "ne"]
    assert by_base[0].prompt_token_ids == by_base[1].prompt_token_ids

    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}?")
    llm.engine.store.registry.load("asked", folder)
    (result,) = llm.chat([ask], SamplingParams(max_tokens=1), adapters="asked")
    assert result.prompt_token_ids == base.encode("garden?", add_special=False)

    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": 999}))
    with pytest.raises(AdapterRefused, match=r"<\|new\|>.*which the base model lacks"):
        llm.engine.store.registry.load("refused", folder)
    llm.close()
