"""Say which tokens keep a text to a form: one Grammar for a form, one GrammarMatcher for each text on its way.

llguidance walks the grammar by the bytes of tokens. What ends a text is ours to say, since each request has its own
end tokens: llguidance is given a token of its own in their place, which the model does not have.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

Words = NDArray[np.int32]
"""Bits, 32 to a word: bit i of the whole says whether token i may be drawn."""

_NO_TOKEN = "the model has no token that goes on in the form"


class NoTokenAllowed(ArithmeticError):
    """A text to which the model's tokens cannot add what its form demands, or only beyond the limits of a step."""


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled form for a model of `vocab_size` tokens."""

    prototype: LLMatcher  # never advanced
    vocab_size: int

    def begin(self, end_token_ids: AbstractSet[int]) -> "GrammarMatcher":
        """Begin a text that any of `end_token_ids` may end, once it has the form."""
        return GrammarMatcher(self, end_token_ids)


class GrammarMatcher:
    """How far one text has come in its grammar."""

    def __init__(self, grammar: Grammar, end_token_ids: AbstractSet[int]) -> None:
        """Begin with no token."""
        self._grammar, self._ends = grammar, end_token_ids
        self._end_bits = _bits(end_token_ids, grammar.vocab_size)
        self._matcher = grammar.prototype.deep_copy()
        self._followed = 0
        self._ended = False  # an end token was drawn that ends nothing, as ignore_eos has it

    def follow(self, token_ids: Sequence[int]) -> None:
        """Come to where `token_ids` end: they go on from those of the last call, unless they are fewer.

        Raises NoTokenAllowed for tokens that do not fit.
        """
        if len(token_ids) < self._followed:
            self._matcher = self._grammar.prototype.deep_copy()
            self._followed, self._ended = 0, False
        for token_id in token_ids[self._followed :]:
            self._followed += 1
            if self._ended or self._matcher.try_consume_tokens([token_id]):
                continue
            if token_id not in self._ends:
                raise NoTokenAllowed(f"token {token_id} does not fit: {_reason(self._matcher)}")
            self._ended = True

    def allowed(self, may_end: bool) -> Words:
        """Return the tokens that may be drawn; without `may_end` none that ends the text, unless nothing else is left.

        Until the text has the form none may end it, unless that token alone goes on in the grammar. Raises
        NoTokenAllowed if there is no token at all.
        """
        words = np.zeros((1, self._grammar.vocab_size // 32 + 1), np.int32)
        if not self._ended:
            fill_next_token_bitmask(self._matcher, words)
        if self._matcher.is_error():
            raise NoTokenAllowed(_reason(self._matcher))
        (going_on,) = words
        complete = self._ended or self._take_own_end(going_on)
        others = going_on & ~self._end_bits
        if complete:
            found = others | self._end_bits if may_end or not others.any() else others
        else:
            found = others if others.any() else going_on
        if not found.any():
            raise NoTokenAllowed(_NO_TOKEN)
        return found

    def _take_own_end(self, words: Words) -> bool:
        """Clear the bit of llguidance's own end token; return whether it was set: then the text has the form."""
        place, bit = divmod(self._grammar.vocab_size, 32)
        was_set = bool(words[place] >> bit & 1)
        words[place] &= np.int32((1 << bit) - 1)
        return was_set


def _reason(matcher: LLMatcher) -> str:
    told = matcher.get_error()
    return _NO_TOKEN if told.startswith("NoExtension") else told[:200]


def _bits(token_ids: AbstractSet[int], vocab_size: int) -> Words:
    bits = np.zeros(vocab_size // 32 + 1, np.uint32)
    for token_id in sorted(token_ids):
        bits[token_id // 32] |= np.uint32(1 << token_id % 32)
    return bits.view(np.int32)
