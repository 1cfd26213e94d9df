"""Request: what a client asked for, validated once and frozen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, TypeGuard, cast, get_args

from lora.activation import activation
from lora.adapter import AdapterRef
from scheduler.parameter_checks import InvalidParameter, as_integer, as_integers, check_token_ids
from scheduler.structured_outputs import StructuredOutputsParams

MAX_TOP_LOGPROBS = 20
MAX_N = 128
LEAST_PENALTY = 0.01
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_BIASES = 1024
MAX_PRIORITY = 1000
MOST_SALT_CHARS = 512
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
"""Whose log-probabilities are told: the model's, or those that a token was drawn by."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a sequence ends. Names and meanings follow the OpenAI API and its common
    extensions (top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids).

    `max_tokens=None` means up to the model's context length. `temperature=0` is greedy. `top_k=0` and
    `top_p=1` and `min_p=0` switch their filters off. `logprobs=k` returns the sampled token's log-probability
    and the k most likely ones, `prompt_logprobs` the same for the prompt. Both are taken from the unmodified
    distribution; those of sampled tokens, with `logprobs_mode="processed_logprobs"`, from the one that was drawn by.
    None means the engine's mode. `seed=None` lets the engine choose one. Text leaves out special tokens unless
    `skip_special_tokens` is false, and what ended it unless `include_stop_str_in_output` is true. With
    `structured_outputs` only tokens are drawn that keep the text to a form, and none ends it before it has that form.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    logprobs_mode: LogprobsMode | None = None

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_integer(name, value))
        self._take_lists()
        structure = cast(object, self.structured_outputs)
        if not (structure is None or isinstance(structure, StructuredOutputsParams)):
            raise InvalidParameter("structured_outputs", structure, "give a StructuredOutputsParams")
        if self.logprobs_mode not in (None, *get_args(LogprobsMode)):
            remedy = f"give {' or '.join(get_args(LogprobsMode))}"
            raise InvalidParameter("logprobs_mode", self.logprobs_mode, remedy)
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not _is_number(value):
                raise InvalidParameter(name, value, "give a number")
            if not low <= value <= high:
                raise InvalidParameter(name, value, f"give a number from {low} to {high}")
        if self.top_p == 0:
            raise InvalidParameter("top_p", self.top_p, "give a number above 0, at most 1")
        if self.repetition_penalty < LEAST_PENALTY:  # dividing by less leaves the logits' range
            remedy = f"give a number above 0, at least {LEAST_PENALTY}"
            raise InvalidParameter("repetition_penalty", self.repetition_penalty, remedy)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                "min_tokens", self.min_tokens, f"give at most max_tokens={self.max_tokens}"
            )

    def _take_lists(self) -> None:
        """Make tuples of lists and mappings: what callers without a type checker give is taken or refused."""
        stop: Any = () if cast(Any, self.stop) is None else self.stop
        stops: tuple[Any, ...] = (stop,) if isinstance(stop, str) else _items("stop", stop)
        if any(not isinstance(text, str) or not text for text in stops):
            raise InvalidParameter("stop", stop, "give non-empty strings")
        if len(stops) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in stops):
            remedy = f"give at most {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters"
            raise InvalidParameter("stop", f"{len(stops)} strings", remedy)
        object.__setattr__(self, "stop", stops)
        ids: Any = () if cast(Any, self.stop_token_ids) is None else self.stop_token_ids
        object.__setattr__(self, "stop_token_ids", as_integers("stop_token_ids", ids))
        bias: Any = () if cast(Any, self.logit_bias) is None else self.logit_bias
        pairs = (
            cast(Mapping[Any, Any], bias).items() if isinstance(bias, Mapping) else _items("logit_bias", bias)
        )
        biases = tuple(map(_bias, pairs))
        object.__setattr__(self, "logit_bias", tuple(sorted(biases)) if isinstance(bias, Mapping) else biases)
        for name, most in (("stop_token_ids", MAX_STOP_TOKEN_IDS), ("logit_bias", MAX_BIASES)):
            if (count := len(getattr(self, name))) > most:
                raise InvalidParameter(name, f"{count} entries", f"give at most {most}")

    @property
    def reads_output(self) -> bool:
        """Return whether drawing a token needs the tokens that were drawn before it."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0) or self.structured_outputs is not None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and value is not True and value is not False


def _items(field: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidParameter(field, cast(object, values), "give a list")
    return tuple(cast(Iterable[Any], values))


def _bias(pair: Any) -> tuple[int, float]:
    """Return a token id and its bias. Raises InvalidParameter for what is no such pair."""
    given = _items("logit_bias", pair)
    if len(given) != 2:
        raise InvalidParameter("logit_bias", given, "give a mapping from token ids to biases")
    token_id, bias = as_integer("logit_bias", given[0]), given[1]
    if not _is_number(bias) or not -100 <= bias <= 100:
        raise InvalidParameter("logit_bias", {token_id: bias}, "give biases from -100 to 100")
    return token_id, bias


_INTEGERS = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")

_OPTIONAL = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})

RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, MAX_N),
    ("max_tokens", 1, 2**31),
    ("min_tokens", 0, 2**31),
    ("temperature", 0, 100),
    ("top_k", 0, 2**31),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, MAX_TOP_LOGPROBS),
    ("prompt_logprobs", 0, MAX_TOP_LOGPROBS),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from: the tenant that it counts for, its priority, and the span above its own.

    With a `cache_salt` its K/V are shared only with requests that have the same.
    """

    tenant: str = ""
    priority: int = 0
    trace: str = ""
    cache_salt: str = ""


NOWHERE = Origin()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, one adapter, `params.n` sequences. `request_id` is unique among live requests.

    `params.seed` is an integer by the time a Request exists. Sequence `i` of `n` draws with stream `stream + i` of it.
    `eos_token_ids` are the tokens that end a sequence unless `params.ignore_eos`; `arrival_s` is on the clock
    that the scheduler is given as `now`.

    Of those that wait, the lower `priority` goes first. A request that has not drawn its first token by
    `first_token_by_s`, on the same clock, is late. `drawn_token_ids` were drawn elsewhere before the stream
    moved here: they are output, not prompt, and only a request of `n=1` has any. `tenant` is whom the request
    is counted for. One in the `background` is the engine's own: it goes after all others, uncounted. K/V are
    shared only among requests of one `cache_salt`. `grammar` is what the engine made of
    `params.structured_outputs`, and `trace` the span that its own are below (W3C's traceparent, or empty): the
    scheduler passes both on. Tokens before position `adapted_from` run under the base model. It is 0 but for an
    activated LoRA, whose invocation is looked for in the prompt.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    adapter: AdapterRef
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    arrival_s: float
    priority: int = 0
    first_token_by_s: float | None = None
    drawn_token_ids: tuple[int, ...] = ()
    tenant: str = ""
    background: bool = False
    stream: int = 0
    trace: str = ""
    cache_salt: str = ""
    grammar: object = field(default=None, compare=False, repr=False)
    adapted_from: int = field(default=0, init=False, compare=False)

    def __post_init__(self) -> None:
        if not -MAX_PRIORITY <= as_integer("priority", self.priority) <= MAX_PRIORITY:
            remedy = f"give a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}"
            raise InvalidParameter("priority", self.priority, remedy)
        if self.first_token_by_s is not None and self.first_token_by_s != self.first_token_by_s:
            raise InvalidParameter("first_token_by_s", self.first_token_by_s, "give seconds, or None")
        if self.drawn_token_ids:
            self._check_drawn()
        if self.adapter.invocation:
            position = activation(self.adapter.invocation, self.prompt_token_ids)
            object.__setattr__(self, "adapted_from", position)

    def _check_drawn(self) -> None:
        """Refuse drawn tokens of several sequences, or of a sequence that they have ended."""
        count, params = len(self.drawn_token_ids), self.params
        if params.n > 1:
            remedy = f"a request of n={params.n} cannot move: give none, or n=1"
            raise InvalidParameter("drawn_token_ids", f"{count} tokens", remedy)
        if params.max_tokens is not None and count >= params.max_tokens:
            remedy = f"none of max_tokens={params.max_tokens} is left to draw: give fewer"
            raise InvalidParameter("drawn_token_ids", f"{count} tokens", remedy)
        ends = self.end_token_ids
        for token_id in self.drawn_token_ids[params.min_tokens :] if ends else ():
            if token_id in ends:
                remedy = f"token {token_id} has ended the sequence: nothing is left to draw"
                raise InvalidParameter("drawn_token_ids", f"{count} tokens", remedy)

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Return the tokens that end a sequence once `params.min_tokens` are drawn."""
        params = self.params
        return frozenset((*(() if params.ignore_eos else self.eos_token_ids), *params.stop_token_ids))

    def within(self, vocab_size: int) -> "Request":
        """Return the request for a model of `vocab_size` tokens.

        End tokens beyond them, which can never be drawn, are left out. Raises InvalidParameter for ids that the
        model does not have. So it does where every token would end the sequence before `min_tokens`, and where none
        could end a structured output.
        """
        check_token_ids("prompt", self.prompt_token_ids, vocab_size)
        check_token_ids("drawn_token_ids", self.drawn_token_ids, vocab_size)
        check_token_ids("stop_token_ids", self.params.stop_token_ids, vocab_size)
        check_token_ids("logit_bias", [token_id for token_id, _ in self.params.logit_bias], vocab_size)
        eos = tuple(token_id for token_id in self.eos_token_ids if 0 <= token_id < vocab_size)
        ends = {*self.params.stop_token_ids, *(() if self.params.ignore_eos else eos)}
        if self.params.min_tokens and len(ends) == vocab_size:
            remedy = "no token is left that does not end the sequence: give 0, or fewer stop_token_ids"
            raise InvalidParameter("min_tokens", self.params.min_tokens, remedy)
        if self.params.structured_outputs is not None and not eos and not self.params.stop_token_ids:
            raise self.params.structured_outputs.refusal("the model has no end token: give stop_token_ids")
        return self if eos == self.eos_token_ids else replace(self, eos_token_ids=eos)

    def told_by(self, mode: LogprobsMode) -> "Request":
        """Return the request with its log-probabilities told by `mode`, unless it asks for another or for none."""
        params = self.params
        if params.logprobs is None or params.logprobs_mode is not None:
            return self
        return replace(self, params=replace(params, logprobs_mode=mode))
