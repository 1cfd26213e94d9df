"""Calls become arrivals: each gets an adapter, a tenant, and a prompt that may begin as earlier ones did.

A prompt begins with its tenant's system prompt. A later turn of a session goes on with the turn before, its
answer, and new text. When calls come, and which adapters they ask for, is left as it is drawn: a call takes up a
session of its adapter that is due, or begins one. Chance is an argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import numpy as np

from lora.adapter import AdapterRef
from scheduler.sim.workload.popularity import Popularity, chosen
from scheduler.sim.workload.prompt import DRAWN_TOKEN_ID, FIRST_TEXT_ID, PromptShape, TextRun
from scheduler.sim.workload.trace import Arrival, Call

_ANSWER_TOKEN_S = 0.05  # how long a token of an answer is taken to last, before the client reads on


class InvalidSessions(ValueError):
    """A number of tenants, turns or tokens that cannot be; says which and the remedy."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Who asks, and what prompts have in common.

    The adapters belong to so many `tenants`, 0 for one each. A session has `turns` in the mean, where its adapter
    is asked for often enough. Its client is ready to ask again `gap_s` after an answer, in the mean, with
    `turn_tokens` of new text in the mean. It begins anew before a prompt and its answer pass `most_tokens`. All
    prompts of a tenant begin with the same `system_tokens`. `background` is the part of the requests that is in
    band 1, behind those of band 0.
    """

    tenants: int = 0
    turns: float = 1.0
    gap_s: float = 15.0
    turn_tokens: int = 100
    most_tokens: int = 16384
    system_tokens: int = 0
    background: float = 0.0

    def __post_init__(self) -> None:
        for field, least in (("tenants", 0), ("turns", 1), ("gap_s", 0), ("turn_tokens", 1)):
            if getattr(self, field) < least:
                raise InvalidSessions(f"{field}={getattr(self, field)}: give {least} or more")
        if self.system_tokens < 0 or not 0 <= self.background <= 1:
            raise InvalidSessions(
                f"system_tokens={self.system_tokens}, background={self.background}: give tokens of 0 or more "
                "and a part from 0 to 1"
            )


def tenants_of(
    adapters: Sequence[AdapterRef], tenants: int, rng: np.random.Generator
) -> dict[AdapterRef, str]:
    """Give each adapter a tenant, each of `tenants` at least one adapter where there are enough; 0: one each."""
    if not tenants:
        return {ref: ref.name for ref in adapters}
    order: list[int] = rng.permutation(len(adapters)).tolist()
    drawn: list[int] = rng.integers(tenants, size=len(adapters)).tolist()
    numbers = [place if place < tenants else at for place, at in zip(order, drawn, strict=True)]
    return {ref: f"tenant-{number}" for ref, number in zip(adapters, numbers, strict=True)}


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a session's next prompt begins with."""

    prompt: PromptShape
    tokens: int


class _Sessions:
    """Those that go on, by adapter and by when their clients ask again."""

    def __init__(self) -> None:
        self._due: dict[AdapterRef, list[tuple[float, int, _Turn]]] = {}
        self._order = count()  # tells apart those of one time

    def add(self, adapter: AdapterRef, due_s: float, turn: _Turn) -> None:
        heappush(self._due.setdefault(adapter, []), (due_s, next(self._order), turn))

    def take(self, adapter: AdapterRef, now: float) -> _Turn | None:
        """Return the one that has been due for longest, None if none is."""
        due = self._due.get(adapter)
        return heappop(due)[2] if due and due[0][0] <= now else None


def in_sessions(
    calls: Sequence[Call],
    adapters: Sequence[AdapterRef],
    law: Popularity,
    options: SessionOptions,
    rng: np.random.Generator,
) -> tuple[Arrival, ...]:
    """Give each call an adapter drawn by `law`, its tenant and its prompt; the run lasts to the last call."""
    owners = tenants_of(adapters, options.tenants, rng)
    texts, sessions = count(FIRST_TEXT_ID), _Sessions()
    systems = {tenant: next(texts) for tenant in dict.fromkeys(owners.values())}
    times = np.array([call.arrival_s for call in calls])
    parts = times / max(float(times.max(initial=0.0)), 1e-9)
    indices: list[int] = chosen(law, np.array([ref.rank for ref in adapters]), parts, rng).tolist()
    goes_on: list[bool] = (rng.random(len(calls)) < 1 - 1 / options.turns).tolist()
    gaps: list[float] = rng.exponential(options.gap_s, len(calls)).tolist()
    fresh: list[int] = rng.geometric(1 / options.turn_tokens, len(calls)).tolist()
    behind: list[bool] = (rng.random(len(calls)) < options.background).tolist()
    arrivals: list[Arrival] = []
    for at, call in enumerate(calls):
        ref = adapters[indices[at]]
        tenant, turn = owners[ref], sessions.take(ref, call.arrival_s) if goes_on[at] else None
        if turn is not None and turn.tokens + fresh[at] + call.output_tokens <= options.most_tokens:
            shape = turn.prompt.then(TextRun(next(texts), fresh[at]))
        else:
            shape = _opening(TextRun(systems[tenant], options.system_tokens), call, next(texts))
        call = Call(call.arrival_s, shape.tokens, call.output_tokens)
        arrivals.append(Arrival(f"r{at}", call, ref, tenant, shape, int(behind[at])))
        if options.turns > 1:
            answered = shape.then(TextRun(DRAWN_TOKEN_ID, call.output_tokens))
            due_s = call.arrival_s + _ANSWER_TOKEN_S * call.output_tokens + gaps[at]
            sessions.add(ref, due_s, _Turn(answered, answered.tokens))
    return tuple(arrivals)


def _opening(system: TextRun, call: Call, text_id: int) -> PromptShape:
    """Make a prompt as long as the call's, or longer where the system prompt leaves no token of it."""
    own = TextRun(text_id, max(1, call.prompt_tokens - system.tokens))
    return PromptShape((system, own) if system.tokens else (own,))
