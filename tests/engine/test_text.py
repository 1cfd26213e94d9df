"""Text in and out: whole characters, whole stop strings, and the same text however the tokens fall."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.errors import InvalidConfig
from engine.tokenizer import Delta, Detokenizer, InvalidChat, Tokenizer
from scheduler.plan import FinishReason, SequenceKey, TokenEvent
from scheduler.request import SamplingParams
from tests.fakes.node import BOS, EOS, byte_tokenizer

BYTES = Tokenizer(byte_tokenizer())
END = BYTES.encode(EOS, add_special=False)[0]


def merging_codec() -> Tokenizer:
    """Byte-level BPE with merges, so that tokens hold several characters, or parts of them."""
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["abcabcab stop stop ünïcödé 你好你好 🙂🙂"] * 4, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def sentencepiece_codec() -> Tokenizer:
    """Words that carry their space in front, with bytes to fall back on, as Llama 2 and Mistral have."""
    tokenizer = RawTokenizer(models.BPE(vocab=WORDS, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


WORDS = {
    token: index
    for index, token in enumerate(
        ["▁the", "▁fox", "es", "▁", "a", "🙂", *(f"<0x{byte:02X}>" for byte in range(256))]
    )
}
MERGING = merging_codec()
SENTENCEPIECE = sentencepiece_codec()


def streamed(
    codec: Tokenizer,
    token_ids: Sequence[int],
    params: SamplingParams = SamplingParams(),  # noqa: B008
    last: FinishReason = FinishReason.LENGTH,
) -> Iterator[Delta]:
    """The Deltas of a sequence that ends with its last token, or before by a stop string."""
    stream = Detokenizer(codec, params)
    for place, token_id in enumerate(token_ids):
        reason = last if place == len(token_ids) - 1 else None
        yield stream.push(TokenEvent(SequenceKey("r", 0), token_id, finish_reason=reason))
        if stream.finished:
            return


def joined(deltas: Iterator[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@settings(deadline=None)
@given(st.text(min_size=1))
@pytest.mark.parametrize("codec", [BYTES, MERGING], ids=["bytes", "merging"])
def test_text_comes_back_whole_and_no_piece_has_half_a_character(codec: Tokenizer, text: str) -> None:
    pieces = [delta.text for delta in streamed(codec, codec.encode(text, add_special=False))]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None)
@given(st.data())
@pytest.mark.parametrize("codec", [BYTES, MERGING], ids=["bytes", "merging"])
def test_any_tokens_join_to_what_the_tokenizer_makes_of_the_whole(
    codec: Tokenizer, data: st.DataObject
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, codec.vocab_size + 3), min_size=1))
    assert joined(streamed(codec, token_ids)) == codec.decode(token_ids)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["▁the", "▁fox", "es", "▁", "a", "🙂", "é", "你"]), min_size=1))
def test_a_stream_is_what_is_added_to_the_prompt_also_where_words_carry_their_space(words: list[str]) -> None:
    token_ids = [
        WORDS[token]
        for word in words
        for token in ([word] if word in WORDS else [f"<0x{byte:02X}>" for byte in word.encode()])
    ]
    prompt = [WORDS["▁the"]]
    expected = SENTENCEPIECE.decode(prompt + token_ids).removeprefix(SENTENCEPIECE.decode(prompt))
    assert joined(streamed(SENTENCEPIECE, token_ids)) == expected


def test_each_token_is_spelled_once_however_long_the_sequence() -> None:
    spelled: list[int] = []

    class Counting(Tokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            spelled.append(token_id)
            return super().token_bytes(token_id)

    token_ids = [0xE4 % 200] * 500
    list(streamed(Counting(byte_tokenizer()), token_ids))
    assert spelled == token_ids


def cut_by_oracle(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Letter by letter: the first time the text so far ends with a stop string, the longest such."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(
    st.text(alphabet="abc ü", min_size=1, max_size=30),
    st.lists(st.text(alphabet="abc ü", min_size=1, max_size=5), min_size=1, max_size=4),
)
@pytest.mark.parametrize("codec", [BYTES, MERGING], ids=["bytes", "merging"])
def test_stop_strings_cut_where_the_oracle_cuts(codec: Tokenizer, text: str, stops: list[str]) -> None:
    params = SamplingParams(stop=tuple(stops))
    deltas = list(streamed(codec, codec.encode(text, add_special=False), params))
    expected, stop = cut_by_oracle(text, stops)
    shown = ""
    for delta in deltas:
        shown += delta.text
        assert expected.startswith(shown), "nothing that is shown is ever taken back"
    assert shown == expected
    assert deltas[-1].stop_reason == stop
    assert deltas[-1].finish_reason is (FinishReason.LENGTH if stop is None else FinishReason.STOP)


def test_text_that_may_become_a_stop_string_is_held_back_and_released_when_it_does_not() -> None:
    params = SamplingParams(stop=("STOP",))
    pieces = [delta.text for delta in streamed(BYTES, BYTES.encode("aSTOxb", add_special=False), params)]
    assert pieces == ["a", "", "", "", "STOx", "b"]


def test_what_is_held_back_is_shown_when_the_sequence_ends() -> None:
    params = SamplingParams(stop=("STOP",))
    assert joined(streamed(BYTES, BYTES.encode("aSTO", add_special=False), params)) == "aSTO"
    half_a_character = BYTES.encode("é", add_special=False)[:1]
    assert joined(streamed(BYTES, half_a_character)) == "\ufffd"


def test_no_stop_string_counts_before_min_tokens() -> None:
    params = SamplingParams(stop=("b",), min_tokens=4)
    deltas = list(streamed(BYTES, BYTES.encode("abcabc", add_special=False), params))
    assert "".join(delta.text for delta in deltas) == "abca"
    assert deltas[-1].stop_reason == "b"


def test_the_token_that_stops_is_no_text_and_a_stop_token_is_named() -> None:
    a, b = BYTES.encode("ab", add_special=False)
    ended = list(streamed(BYTES, [a, END], last=FinishReason.STOP))[-1]
    assert (ended.text, ended.token_ids, ended.stop_reason) == ("", (END,), None)
    params = SamplingParams(stop_token_ids=(b,))
    stopped = list(streamed(BYTES, [a, b], params, FinishReason.STOP))[-1]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("", FinishReason.STOP, b)


def test_special_tokens_are_no_text_unless_asked_for() -> None:
    a = BYTES.encode("a", add_special=False)[0]
    assert joined(streamed(BYTES, [a, END, a])) == "aa"
    stream = Detokenizer(BYTES, SamplingParams(), skip_special=False)
    assert stream.push(TokenEvent(SequenceKey("r", 0), END)).text == EOS


def test_a_prompt_gets_what_the_model_expects_in_front_and_a_conversation_its_template() -> None:
    assert BYTES.decode(BYTES.encode("hi"), skip_special=False) == f"{BOS}hi"
    token_ids = BYTES.encode_chat([{"role": "user", "content": "hi"}])
    assert BYTES.decode(token_ids, skip_special=False) == "user: hi\nassistant: "


def test_a_model_without_a_template_and_a_template_that_refuses_say_so() -> None:
    with pytest.raises(InvalidChat, match="use /v1/completions"):
        Tokenizer(byte_tokenizer(chat_template=None)).encode_chat([{"role": "user", "content": "hi"}])
    with pytest.raises(InvalidChat, match="no such talk"):
        BYTES.encode_chat([{"role": "user", "content": "refuse me"}])


def test_tokens_that_are_no_utf8_by_themselves_have_distinct_names() -> None:
    first, second = BYTES.encode("é", add_special=False)
    assert (BYTES.token_text(first), BYTES.token_text(second)) == (r"bytes:\xc3", r"bytes:\xa9")
    assert BYTES.token_bytes(first) + BYTES.token_bytes(second) == "é".encode()
    assert BYTES.token_bytes(BYTES.vocab_size + 7) == b""


@settings(deadline=None)
@given(st.text())
def test_the_characters_that_begin_in_tokens_add_up(text: str) -> None:
    assert sum(map(MERGING.num_chars, MERGING.encode(text, add_special=False))) == len(text)


def test_a_codec_is_read_from_a_folder_and_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    codec = Tokenizer.load(tmp_path / "model")
    assert codec.encode("hi") == BYTES.encode("hi")
    assert codec.has_chat_template
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidConfig, match="empty"):
        Tokenizer.load(tmp_path / "empty")
