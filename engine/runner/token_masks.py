"""Keep the matchers of the sequences whose text must have a form, and make the masks of a step's draws."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from engine.structured.grammar import Grammar, GrammarMatcher, NoTokenAllowed, Words
from scheduler.plan import SequenceKey, Slice
from scheduler.request import Request

_KEPT_CALLS = 16  # for which a sequence that draws nothing keeps its matcher: after that it is followed anew
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _LiveMatcher:
    """The matcher of a sequence, and when it was last asked."""

    request: Request
    matcher: GrammarMatcher
    call: int


class TokenMasks:
    """Owner of the matchers. Used by the step thread alone; any of them can be made anew from its sequence's tokens."""

    def __init__(self) -> None:
        """Know no sequence."""
        self._live: dict[SequenceKey, _LiveMatcher] = {}
        self._calls = 0

    def __len__(self) -> int:
        return len(self._live)

    def of(self, parts: Sequence[Slice]) -> tuple[dict[SequenceKey, Words], tuple[SequenceKey, ...]]:
        """Return what each sequence whose text has a form may draw, and the sequences that may draw nothing."""
        chosen = [part for part in parts if part.request.params.structured_outputs is not None]
        if not chosen:
            return {}, ()
        self._forget_old()
        allowed: dict[SequenceKey, Words] = {}
        stuck: list[SequenceKey] = []
        for part in chosen:
            matcher = self._matcher_of(part)
            try:
                matcher.follow(part.output_token_ids)
                allowed[part.key] = matcher.allowed(part.output_index >= part.request.params.min_tokens)
            except NoTokenAllowed as error:
                _log.warning("request %s has no token to draw: %s", part.key.request_id, error)
                stuck.append(part.key)
        return allowed, tuple(stuck)

    def _matcher_of(self, part: Slice) -> GrammarMatcher:
        live = self._live.get(part.key)
        if live is None or live.request is not part.request:
            request, grammar = part.request, part.request.grammar
            assert isinstance(grammar, Grammar), "the engine's own"
            ends = request.end_token_ids | frozenset(request.eos_token_ids)
            live = self._live[part.key] = _LiveMatcher(request, grammar.begin(ends), self._calls)
        live.call = self._calls
        return live.matcher

    def _forget_old(self) -> None:
        self._calls += 1
        if self._calls % _KEPT_CALLS == 0:
            oldest = self._calls - _KEPT_CALLS
            self._live = {key: live for key, live in self._live.items() if live.call >= oldest}
