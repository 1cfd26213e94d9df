"""Say what offline generation returns: the answers of one prompt, and what was asked to be told of them."""

from dataclasses import dataclass

from engine.output import Delta, RequestOutput, join_deltas
from scheduler.plan import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class CalledTool:
    """One call in an answer; `arguments` is the text of a JSON object, unless the answer was cut off in it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Output:
    """One of a request's `n` answers. `logprobs` is empty unless asked for, `tool_calls` unless tools were offered."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]
    tool_calls: tuple[CalledTool, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A prompt's answers. `token_times_s` are seconds from submission to each token of output 0."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Output, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    cached_tokens: int
    token_times_s: tuple[float, ...]


def result_of(output: RequestOutput) -> Result:
    """Put together what came of a request that has ended."""
    by_index: list[list[Delta]] = [[] for _ in range(output.request.params.n)]
    for delta in output.take():
        by_index[delta.index].append(delta)
    joined = [join_deltas(deltas) for deltas in by_index]
    return Result(
        prompt_token_ids=output.request.prompt_token_ids,
        outputs=tuple(map(_output, joined)),
        prompt_logprobs=joined[0].prompt_logprobs,
        cached_tokens=output.cached_tokens,
        token_times_s=tuple(output.token_times_s[0]),
    )


def _output(joined: Delta) -> Output:
    assert joined.finish_reason is not None, "a sequence's last Delta says why it ended"
    return Output(joined.index, joined.text, joined.token_ids, joined.finish_reason, joined.logprobs)
