"""Compute a short prompt with the base and with every named adapter before an engine serves.

It goes the way of any request, so that what a client would meet first is met here: weights that give no numbers, an
adapter that gives none, one that changes nothing.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.core import EngineCore, Failure
from engine.errors import EngineError, EngineStopped
from lora.adapter import BASE, AdapterRef
from lora.errors import AdapterRefused
from model.tensor_files import CheckpointError
from scheduler.plan import TokenLogprob
from scheduler.request import Request, SamplingParams

_PROMPT_TOKENS = 4
_BASE_ID = "self-test"
_PARAMS = SamplingParams(temperature=0, max_tokens=1, logprobs=5, seed=0)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SelfTest:
    """A core, how to wait until an adapter has arrived, and the limits of a prompt."""

    core: EngineCore
    wait_ready: Callable[[], None]
    vocab_size: int
    max_model_len: int

    def run(self, adapters: Sequence[AdapterRef]) -> None:
        """Compute the prompt with the base and each adapter, in as few steps as there is room for.

        Raises CheckpointError for the base, AdapterRefused for an adapter. One that changes nothing is warned of.
        """
        ids = tuple(range(min(_PROMPT_TOKENS, self.vocab_size, self.max_model_len - 1)))
        if not ids:
            return
        refs = {_BASE_ID: BASE} | {f"{_BASE_ID}-{ref.name}": ref for ref in adapters}
        now_s = time.monotonic()
        for request_id, ref in refs.items():
            self.core.submit(Request(request_id, ids, ref, _PARAMS, (), now_s))
        found: dict[str, TokenLogprob | None] = {}
        try:
            while len(found) < len(refs):
                result = self.core.step()
                for failure in result.failures:
                    _refuse(failure, refs)
                found |= {event.key.request_id: event.logprob for event in result.events}
                if result.idle:
                    self.wait_ready()
        except EngineStopped as error:
            raise _base_fails(error) from error
        finally:
            for request_id in refs:
                self.core.abort(request_id)
        for request_id, ref in refs.items():
            if not ref.is_base and found[request_id] == found[_BASE_ID]:
                _log.warning("adapter %s gives a short prompt the base's very log-probabilities", ref.name)


def _base_fails(error: EngineError) -> CheckpointError:
    return CheckpointError(f"the base model fails on a prompt of {_PROMPT_TOKENS} tokens: {error}")


def _refuse(failure: Failure, refs: dict[str, AdapterRef]) -> None:
    """Raise what a failed request means for the start."""
    ref = refs[failure.request_id]
    if ref.is_base:
        raise _base_fails(failure.error)
    raise AdapterRefused(ref.name, f"it fails on a prompt of {_PROMPT_TOKENS} tokens: {failure.error}")
