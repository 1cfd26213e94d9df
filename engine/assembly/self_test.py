"""Compute a short prompt with the base when an engine starts, and with every adapter before its name is served.

It goes the way of any request, so that what a client would meet first is met here: weights that give no numbers, an
adapter that gives none, one that changes nothing. It gives way to all requests, and is counted as none.
"""

import itertools
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass

from engine.core import EngineCore
from engine.errors import EngineError, NotInTime, StepFailed
from lora.adapter import BASE, AdapterRef, Effect
from lora.errors import AdapterRefused
from lora.format.adapter_files import short
from model.checkpoint_files import CheckpointError
from scheduler.plan import TokenEvent, TokenLogprob
from scheduler.request import MAX_TOP_LOGPROBS, Request, SamplingParams

_PROMPT_TOKENS = 4
_PARAMS = SamplingParams(temperature=0, max_tokens=1, logprobs=MAX_TOP_LOGPROBS, seed=0)
_MOST_OUTCOMES = 4096
_LOOK_S = 0.05  # how often it is looked whether nobody steps the core any more
_IDLE_S = 0.5


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What an adapter's trial came to: an effect, or the reason why it is refused."""

    effect: Effect = "unknown"
    refusal: str | None = None


class SelfTest:
    """AdapterTrial of a core's adapters, and the test of its base. Any thread may call every method.

    Whoever steps the core computes it along; while nobody does, the calling thread steps the core itself. What came of
    a content is remembered: equal digests give equal answers.
    """

    def __init__(
        self,
        core: EngineCore,
        changed: threading.Event,
        vocab_size: int,
        max_model_len: int,
        patience_s: float = 5.0,
    ) -> None:
        """Wait at most `patience_s` for one answer; `changed` is set when an adapter has arrived."""
        self._core = core
        self._changed = changed
        self._vocab_size, self._most_tokens = vocab_size, max_model_len - 1
        self._prompt = tuple(range(min(_PROMPT_TOKENS, vocab_size, self._most_tokens)))
        self._patience_s = patience_s
        self._numbers = itertools.count(1)
        self._base: TokenLogprob | None = None
        self._lock = threading.Lock()  # guards what follows
        self._outcomes: dict[str, _Outcome] = {}  # by digest, the oldest first

    def check_base(self) -> None:
        """Compute the prompt with the base, and keep its answer. Raises CheckpointError."""
        try:
            self._base = self._answer(BASE, self._prompt)
        except EngineError as error:
            raise CheckpointError(
                f"the base model fails on a prompt of {len(self._prompt)} tokens: {error}"
            ) from None

    def __call__(self, ref: AdapterRef, waits: bool) -> Effect | None:
        """See AdapterTrial."""
        with self._lock:
            outcome = self._outcomes.get(ref.digest)
        if outcome is None:
            if not waits and self._core.live().waiting:
                return None
            outcome = self._compare(ref)
        if outcome.refusal is not None:
            raise AdapterRefused(ref.name, outcome.refusal)
        return outcome.effect

    def _compare(self, ref: AdapterRef) -> _Outcome:
        """Compute the prompt, and its invocation after it, with an adapter. Raises AdapterRefused, UnknownAdapter."""
        base, prompt = self._base, (*self._prompt, *ref.invocation)[-self._most_tokens :]
        try:
            if ref.invocation:
                self._check_invocation(ref)
                base = self._answer(BASE, prompt)
            answer = self._answer(ref, prompt)
        except NotInTime:
            return _Outcome()  # it may be tried again when it is loaded again
        except EngineError as error:
            reason = f"it fails on a prompt of {len(self._prompt)} tokens: {error}"
            if not (isinstance(error, StepFailed) and error.is_own):
                raise AdapterRefused(ref.name, reason, may_pass=True) from error
            outcome = _Outcome(refusal=reason)
        else:
            outcome = _Outcome("none" if answer == base else "some")
        with self._lock:
            self._outcomes[ref.digest] = outcome
            while len(self._outcomes) > _MOST_OUTCOMES:
                del self._outcomes[next(iter(self._outcomes))]
        return outcome

    def _check_invocation(self, ref: AdapterRef) -> None:
        """Raise AdapterRefused for an invocation that no prompt can have: a peer may have told of any."""
        if len(ref.invocation) > self._most_tokens or max(ref.invocation) >= self._vocab_size:
            raise AdapterRefused(
                ref.name,
                f"no prompt can have its invocation (token ids {short(list(ref.invocation))}): the base model has"
                f" {self._vocab_size} tokens, and a prompt at most {self._most_tokens}",
            )

    def _answer(self, adapter: AdapterRef, prompt: tuple[int, ...]) -> TokenLogprob | None:
        """Compute the prompt's next token. Raises EngineError for what went wrong, NotInTime."""
        request_id = f"self-test-{next(self._numbers)}"
        request = Request(request_id, prompt, adapter, _PARAMS, (), time.monotonic(), background=True)
        try:
            outcome = self._core.probe(request)
            self._wait(outcome)
            if not outcome.done():
                raise NotInTime(f"the engine was busy for {self._patience_s:g} s", 1)
            return outcome.result().logprob
        finally:
            self._core.abort(request_id)

    def _wait(self, outcome: Future[TokenEvent]) -> None:
        """Wait for an outcome while others step the core, and step it while nobody does.

        Steps of one's own take what they take: kernels may be compiled in the first.
        """
        left_s = self._patience_s
        while not outcome.done() and left_s > 0:
            began_s = time.monotonic()
            if self._core.driving.acquire(blocking=False):
                try:
                    if not self._core.step().idle:
                        continue
                    self._changed.wait(min(_IDLE_S, left_s))
                    self._changed.clear()
                finally:
                    self._core.driving.release()
            else:
                wait((outcome,), timeout=min(_LOOK_S, left_s))
            left_s -= time.monotonic() - began_s
