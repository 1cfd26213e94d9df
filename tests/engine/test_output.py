"""Text as it comes: whole characters, whole stop strings, the same text however the tokens fall, and its end."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import StepFailed
from engine.output import Delta, Detokenizer, RequestOutput, join_deltas
from engine.tokenizer import Tokenizer
from lora.adapter import BASE
from scheduler.plan import FinishReason, SequenceKey, TokenEvent, TokenLogprob
from scheduler.request import Request, SamplingParams
from tests.fakes.tokenizers import EOS, WORDS, byte_tokenizer, merging_tokenizer, sentencepiece_tokenizer

BYTES, MERGING, SENTENCEPIECE = Tokenizer(byte_tokenizer()), merging_tokenizer(), sentencepiece_tokenizer()
END = BYTES.encode(EOS, add_special=False)[0]


def streamed(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    params: SamplingParams = SamplingParams(),  # noqa: B008
    last: FinishReason = FinishReason.LENGTH,
) -> Iterator[Delta]:
    """The Deltas of a sequence that ends with its last token, or before by a stop string."""
    stream = Detokenizer(tokenizer, params)
    for place, token_id in enumerate(token_ids):
        reason = last if place == len(token_ids) - 1 else None
        yield stream.push(TokenEvent(SequenceKey("r", 0), token_id, finish_reason=reason))
        if stream.finished:
            return


def text_of(deltas: Iterator[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@settings(deadline=None)
@given(st.text(min_size=1))
@pytest.mark.parametrize("tokenizer", [BYTES, MERGING], ids=["bytes", "merging"])
def test_text_comes_back_whole_and_no_piece_has_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = [delta.text for delta in streamed(tokenizer, tokenizer.encode(text, add_special=False))]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None)
@given(st.data())
@pytest.mark.parametrize("tokenizer", [BYTES, MERGING], ids=["bytes", "merging"])
def test_any_tokens_join_to_what_the_tokenizer_makes_of_the_whole(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), min_size=1))
    assert text_of(streamed(tokenizer, token_ids)) == tokenizer.decode(token_ids)


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
    assert text_of(streamed(SENTENCEPIECE, token_ids)) == expected


def test_a_stop_string_that_is_a_special_tokens_text_stops_at_the_token() -> None:
    token_ids = [*BYTES.encode("ab<", add_special=False), END, *BYTES.encode("c", add_special=False)]
    deltas = list(streamed(BYTES, token_ids, SamplingParams(stop=("zz", EOS))))
    assert text_of(iter(deltas)) == "ab<"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, EOS)
    assert deltas[-1].token_ids == (END,)
    late = list(streamed(BYTES, token_ids, SamplingParams(stop=(EOS,), min_tokens=5)))
    assert (text_of(iter(late)), late[-1].finish_reason) == ("ab<c", FinishReason.LENGTH)
    assert text_of(streamed(BYTES, token_ids, SamplingParams(stop=("zz",)))) == "ab<c"


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
@pytest.mark.parametrize("tokenizer", [BYTES, MERGING], ids=["bytes", "merging"])
def test_stop_strings_cut_where_the_oracle_cuts(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    params = SamplingParams(stop=tuple(stops))
    deltas = list(streamed(tokenizer, tokenizer.encode(text, add_special=False), params))
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
    assert text_of(streamed(BYTES, BYTES.encode("aSTO", add_special=False), params)) == "aSTO"
    half_a_character = BYTES.encode("é", add_special=False)[:1]
    assert text_of(streamed(BYTES, half_a_character)) == "\ufffd"


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
    assert text_of(streamed(BYTES, [a, END, a])) == "aa"
    stream = Detokenizer(BYTES, SamplingParams(skip_special_tokens=False))
    assert stream.push(TokenEvent(SequenceKey("r", 0), END)).text == EOS


def output(n: int = 1, aborted: list[str] | None = None, **params: object) -> RequestOutput:
    """The output of request `r`, submitted at 10 s; `aborted` collects the ids that it aborts."""
    sampling = SamplingParams(n=n, **params)  # pyright: ignore[reportArgumentType]
    request = Request("r", (1,), BASE, sampling, (END,), 10.0)
    return RequestOutput(request, BYTES, (aborted if aborted is not None else []).append)


def event(index: int, text: str, reason: FinishReason | None = None) -> TokenEvent:
    (token_id,) = BYTES.encode(text, add_special=False)
    return TokenEvent(SequenceKey("r", index), token_id, finish_reason=reason, cached_tokens=3)


def test_deltas_are_taken_once_and_counted_and_timed_by_sequence() -> None:
    made = output(n=2)
    for at_s, (index, text) in enumerate([(0, "a"), (1, "b"), (0, "c")], start=11):
        made.push(event(index, text), at_s)
    assert [(delta.index, delta.text) for delta in made.take()] == [(0, "a"), (1, "b"), (0, "c")]
    assert made.take() == ()
    assert (made.output_tokens, made.cached_tokens) == (3, 3)
    assert made.token_times_s == ([1, 3], [2])


def test_what_follows_the_end_of_a_sequence_is_dropped() -> None:
    made = output(stop=("b",))
    assert [made.push(event(0, text), 11) for text in "abc"][2] is None
    assert not made.is_open
    assert join_deltas(made.take()).text == "a"


async def all_of(made: RequestOutput) -> str:
    return "".join([delta.text async for delta in made])


def test_a_reader_that_waits_gets_every_delta_and_then_the_end_however_often_it_asks() -> None:
    async def read() -> tuple[str, str]:
        made = output()
        reader = asyncio.create_task(all_of(made))
        await asyncio.sleep(0)
        made.push(event(0, "a"), 11)
        await asyncio.sleep(0)
        made.push(event(0, "b", FinishReason.LENGTH), 12)
        return await reader, await all_of(made)

    assert asyncio.run(read()) == ("ab", "")


def test_an_error_comes_after_what_came_before_it() -> None:
    async def read() -> str:
        made = output()
        made.push(event(0, "a"), 11)
        made.fail(StepFailed("the step failed"))
        first = await anext(made)
        with pytest.raises(StepFailed):
            await anext(made)
        return first.text

    assert asyncio.run(read()) == "a"


def test_a_reader_that_leaves_aborts_what_still_runs_once() -> None:
    async def read() -> list[str]:
        aborted: list[str] = []
        running, ended = output(aborted=aborted), output(aborted=aborted)
        ended.push(event(0, "a", FinishReason.LENGTH), 11)
        for each in (ended, running, running):
            await each.aclose()
        return aborted

    assert asyncio.run(read()) == ["r"]


def test_joined_deltas_say_all_that_the_parts_said() -> None:
    entry = TokenLogprob(5, -0.5, 1, ())
    first = Delta(1, "a", (5,), (entry,), prompt_logprobs=(entry,))
    last = Delta(1, "b", (6, 7), (), FinishReason.STOP, "stop")
    assert join_deltas([first, last]) == Delta(
        1, "ab", (5, 6, 7), (entry,), FinishReason.STOP, "stop", (entry,)
    )
