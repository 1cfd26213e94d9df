"""A text that fits is never beyond the bound on its characters, whatever the tokenizer does to it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.text.prompt_bound import DROPPING, most_chars_per_token
from tests.chance import examples
from tests.fakes.tokenizers import WORDS, byte_tokenizer

LONGEST = 9  # "<|begin|>", the byte tokenizer's longest token
COMPOSED = st.text(st.sampled_from("α\u0313\u0300\u0345e\u0301 \u1112\u1161\u11ab"))


def byte_level() -> Tokenizer:
    return byte_tokenizer().backend_tokenizer


def words_with_bytes() -> Tokenizer:
    made = Tokenizer(models.BPE(vocab=WORDS, merges=[], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.ByteFallback()
    return made


def composing() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.NFKC()
    return made


def shortening() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.Replace("\u1112\u1161\u11ab", "h")
    return made


KEEPING = {each.__name__: each() for each in (byte_level, words_with_bytes, composing, shortening)}
BOUNDS = {name: most_chars_per_token(tokenizer) for name, tokenizer in KEEPING.items()}


@pytest.mark.parametrize("name", KEEPING)
@settings(deadline=None, max_examples=examples(50))
@given(text=st.text() | COMPOSED)
def test_no_text_that_fits_is_beyond_the_bound(name: str, text: str) -> None:
    (encoding,) = KEEPING[name].encode_batch_fast([text])
    assert len(text) <= len(encoding.ids) * BOUNDS[name]


@pytest.mark.parametrize(("name", "factor"), [("byte_level", 1), ("composing", 4), ("shortening", 3)])
def test_the_bound_is_the_longest_token_times_what_normalising_composes(name: str, factor: int) -> None:
    assert BOUNDS[name] == LONGEST * factor


def stripping() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    return made


def collapsing() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    return made


def splitting_spaces_off() -> Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


def swallowing_spaces() -> Tokenizer:
    made = byte_level()
    made.add_special_tokens([AddedToken("<|eat|>", rstrip=True)])
    return made


def whole_words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"<unknown>": 0}, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.mark.parametrize(
    "make", [stripping, collapsing, splitting_spaces_off, swallowing_spaces, whole_words]
)
def test_a_tokenizer_that_drops_characters_gets_a_wide_bound(make: type) -> None:
    assert most_chars_per_token(make()) == LONGEST * DROPPING
