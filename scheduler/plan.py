"""StepPlan: which tokens run in one step; and what comes back of it.

What there is one of for every sequence of every step is no dataclass, which takes 1 us to make: what the scheduler
says is a NamedTuple (0.3 us), since columns of a batch of them come out by `zip`; what comes back is a msgspec Struct
(0.06 us), at which the garbage collector need not look, since none is ever part of a cycle.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from msgspec import Struct

from lora.adapter import BASE, AdapterRef
from scheduler.request import Request

PENDING = -1
"""In place of a token id: the token that the same sequence's latest slice draws."""


class FinishReason(StrEnum):
    """Why a sequence ended: an end or stop token or stop string, its token limit, or its client's leaving."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SequenceKey:
    """One of a request's `n` sequences."""

    request_id: str
    index: int


class Slice(NamedTuple):
    """The tokens of one sequence that run in this step: positions `start .. start + len(token_ids) - 1`.

    The last of them is PENDING where the plan that draws it is still to be committed. `block_table` names the
    K/V blocks of positions 0 up to and including the slice's last. `samples` is true when the slice reaches
    the sequence's end. Then its last row's logits yield the next token, which is the sequence's
    `output_index`-th (from 0). `output_token_ids` holds the tokens drawn so far, and only where
    `request.params.reads_output`. `prompt_logprobs` is true when the slice's rows must yield the log-probability
    of the prompt token that follows each. All its tokens run under one adapter, or all under the base.
    """

    key: SequenceKey
    request: Request
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    samples: bool
    output_index: int
    output_token_ids: tuple[int, ...]
    prompt_logprobs: bool

    @property
    def adapter(self) -> AdapterRef:
        """Return the adapter that these tokens run under."""
        request = self.request
        return request.adapter if self.start >= request.adapted_from else BASE


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's slices, in the order they were scheduled; empty when nothing can run now."""

    slices: tuple[Slice, ...]

    @property
    def num_tokens(self) -> int:
        """Return rows of the step's batch."""
        return sum(len(part.token_ids) for part in self.slices)

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """Return the distinct adapters of the step, the base excepted, in order of first appearance."""
        return tuple(dict.fromkeys(part.adapter for part in self.slices if not part.adapter.is_base))


@dataclass(frozen=True, slots=True)
class Live:
    """Sequences that wait and that run, and how often one was preempted since the start."""

    waiting: int
    running: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Overdue:
    """The adapter that a sequence has been passed over for too long for want of, and those that running sequences
    use, by digest."""

    adapter: AdapterRef
    running: frozenset[str]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability, its rank (1 = most likely), and the most likely alternatives as
    (token id, log-probability), most likely first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class SliceOutput(Struct, frozen=True, gc=False):
    """What the executor computed for one slice.

    `token_id` is None unless the slice samples; `logprob` is None unless the request asked for it;
    `prompt_logprobs` covers the prompt tokens at positions `start + 1 ..` that this slice's rows predict.
    """

    token_id: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class TokenEvent(Struct, frozen=True, gc=False):
    """What a sequence gained in a step: one token, its end, or both (`token_id` is None only when a sequence
    ends without a new token). `prompt_logprobs` comes whole, with the sequence's first event, and has no entry
    for the prompt's first token. `cached_tokens` is how many prompt tokens the prefix cache supplied.
    """

    key: SequenceKey
    token_id: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
