"""A SentencePiece model without tokenizer.json is served, with the tokens that SentencePiece itself makes."""

import json
from pathlib import Path
from random import Random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from engine.assembly.tokenizer_loading import load_tokenizer
from engine.text.prompt_bound import DROPPING
from engine.tokenizer import Tokenizer
from tests.chance import examples

VOCABULARY = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "garden",
    "über",
    "naïve",
    "你好",
    "world",
    "12",
    "345",
]
TEXTS = st.lists(st.sampled_from([*VOCABULARY, " ", "  ", "\n", "🙂", "zzz", ",", "é"])).map("".join)


def train(folder: Path, kind: str) -> sentencepiece.SentencePieceProcessor:
    rng = Random(0)
    sentencepiece.SentencePieceTrainer.train(  # as Llama 2 and Mistral were trained
        sentence_iterator=iter([" ".join(rng.choices(VOCABULARY, k=8)) for _ in range(200)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = train(folder, request.param)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return load_tokenizer(folder), oracle


@settings(deadline=None, max_examples=examples(100))
@given(text=TEXTS)
def test_its_tokens_are_those_of_sentencepiece(
    pair: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    tokenizer, oracle = pair
    expected = oracle.encode(text)
    assert tokenizer.encode(text, add_special=False) == tuple(expected)
    assert tokenizer.encode(text) == (oracle.bos_id(), *expected)
    assert tokenizer.decode(expected) == oracle.decode(expected)


def test_its_longest_token_bounds_a_prompt(
    pair: tuple[Tokenizer, sentencepiece.SentencePieceProcessor],
) -> None:
    tokenizer, oracle = pair
    pieces = [oracle.id_to_piece(token_id) for token_id in range(oracle.get_piece_size())]
    factor = 1 if isinstance(tokenizer._backend.model, models.BPE) else DROPPING
    assert tokenizer.most_chars(1) == max(map(len, pieces)) * factor


def test_its_end_token_is_known_and_bos_can_be_turned_off(tmp_path: Path) -> None:
    oracle = train(tmp_path, "bpe")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_tokenizer(tmp_path).eos_token_ids == (oracle.eos_id(),)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load_tokenizer(tmp_path).encode("fox") == tuple(oracle.encode("fox"))
