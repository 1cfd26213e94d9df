"""Calls: when requests come and how long they are, read from a trace or drawn.

Text and an rng in, values out; reading files is left to whoever has a file system. A call names no
adapter; an arrival does.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from lora.adapter import AdapterRef
from scheduler.sim.workload.prompt import OWN_TEXT, PromptShape

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOST_TOKENS = 2**31


class InvalidTrace(ValueError):
    """A trace that lacks a column, has a field that is not what the column holds, or has too few rows."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to be: when it arrives, and how long prompt and output are."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int

    def at(self, arrival_s: float) -> "Call":
        """Return the same call at another time."""
        return Call(arrival_s, self.prompt_tokens, self.output_tokens)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call that names its adapter, and whose it is.

    `prompt` says what its prompt shares with others; `priority` is the band that it is served in, lower first.
    """

    name: str
    call: Call
    adapter: AdapterRef
    tenant: str = ""
    prompt: PromptShape = OWN_TEXT
    priority: int = 0

    def prompt_token_ids(self, own_id: int) -> tuple[int, ...]:
        """Make the prompt's ids; `own_id` is of the text that no other prompt has."""
        return self.prompt.token_ids(self.call.prompt_tokens, own_id)


def read_trace(text: str) -> tuple[Call, ...]:
    """Read the calls of an Azure LLM inference trace, the first at 0 s.

    It is a CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Timestamps have seven decimals, of which the
    last is below a microsecond and is dropped. Raises InvalidTrace with the line, the column and what is
    wrong there.
    """
    table = csv.DictReader(text.splitlines())
    lacking = [name for name in _COLUMNS if table.fieldnames and name not in table.fieldnames]
    if lacking:
        raise InvalidTrace(
            f"line 1 lacks the column {lacking[0]}: give a CSV that begins with {','.join(_COLUMNS)}"
        )
    calls = sorted((_call(row, table.line_num) for row in table), key=lambda call: call.arrival_s)
    if not calls:
        raise InvalidTrace(f"the trace has no rows: give a CSV of {','.join(_COLUMNS)}")
    return tuple(call.at(call.arrival_s - calls[0].arrival_s) for call in calls)


def poisson(
    rate: float, seconds: float, lengths: tuple[int, int], rng: np.random.Generator
) -> tuple[Call, ...]:
    """Draw calls at `rate` a second; prompt and output lengths are geometric with the means `lengths`."""
    count = int(rng.poisson(rate * seconds))
    times = np.sort(rng.random(count) * seconds).tolist()
    prompts, outputs = (rng.geometric(1 / mean, count).tolist() for mean in lengths)
    return tuple(Call(*each) for each in zip(times, prompts, outputs, strict=True))


def paced(calls: Sequence[Call], rate: float, seconds: float, first: int = 0) -> tuple[Call, ...]:
    """Take `rate · seconds` successive calls of a trace from call `first` on (after its last comes its
    first, as often as it takes).

    Time is stretched so that they fill `seconds`: the trace's lengths and the shape of its bursts at a rate
    of choice.
    """
    count = round(rate * seconds)
    if count < 1:
        raise InvalidTrace(f"rate={rate:g} over seconds={seconds:g} takes no call: give more of either")
    end_s = calls[-1].arrival_s + calls[-1].arrival_s / len(calls)
    laps = [divmod(first + at, len(calls)) for at in range(count + 1)]
    times = np.array([lap * end_s + calls[at].arrival_s for lap, at in laps])
    times = (times - times[0]) * (seconds / max(times[-1] - times[0], 1e-9))
    return tuple(
        calls[at].at(min(time_s, seconds)) for time_s, (_, at) in zip(times.tolist(), laps[:-1], strict=False)
    )


def busiest_s(calls: Sequence[Call], seconds: float) -> float:
    """Find where the `seconds` begin in which most tokens are asked for; one of the calls' times, or 0 if all
    fit."""
    if not calls or calls[-1].arrival_s <= seconds:
        return 0.0
    times = np.array([call.arrival_s for call in calls])
    tokens = np.concatenate([[0], np.cumsum([call.prompt_tokens + call.output_tokens for call in calls])])
    ends = np.searchsorted(times, times + seconds)
    return float(times[int(np.argmax(tokens[ends] - tokens[: len(times)]))])


def _call(row: dict[str, str | None], line: int) -> Call:
    """Read a call. A prompt has a token at least; an answer that was none is taken for one of a single token."""
    prompt, output = _tokens(row, "ContextTokens", line, 1), _tokens(row, "GeneratedTokens", line, 0)
    return Call(_time_s(row, line), prompt, max(1, output))


def _time_s(row: dict[str, str | None], line: int) -> float:
    given = row["TIMESTAMP"]
    try:
        return datetime.fromisoformat((given or "")[:26]).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise _wrong(line, "TIMESTAMP", given, "a time such as 2023-11-16 18:17:03.9799600") from error


def _tokens(row: dict[str, str | None], column: str, line: int, least: int) -> int:
    given = row[column]
    try:
        count = int(given or "")
    except ValueError as error:
        raise _wrong(line, column, given, f"a whole number of {least} or more") from error
    if not least <= count <= _MOST_TOKENS:
        raise _wrong(line, column, given, f"a whole number from {least} to {_MOST_TOKENS}")
    return count


def _wrong(line: int, column: str, given: str | None, wanted: str) -> InvalidTrace:
    found = "nothing" if given is None else repr(given)
    return InvalidTrace(f"line {line}, column {column}: found {found}: give {wanted}")
