"""What prompts have in common: a prompt is runs of tokens, and equal runs are equal text.

Within a run every token has the run's id. So prompts that begin with the same runs have the same token ids there,
and real prefix digests match there and nowhere else. Ids need be in no vocabulary: nothing computes them.
"""

from dataclasses import dataclass
from itertools import chain, repeat

DRAWN_TOKEN_ID = 1  # what simulated nodes draw
FIRST_TEXT_ID = 2  # below it are ids that mean something else


@dataclass(frozen=True, slots=True)
class TextRun:
    """So many `tokens` of one text, whose every token is `text_id`."""

    text_id: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PromptShape:
    """The runs that a prompt begins with; what follows them is text of its own."""

    runs: tuple[TextRun, ...] = ()

    @property
    def tokens(self) -> int:
        """Return how many tokens the runs have."""
        return sum(run.tokens for run in self.runs)

    def token_ids(self, prompt_tokens: int, own_id: int) -> tuple[int, ...]:
        """Make the ids of a prompt of `prompt_tokens`; `own_id` is of the text that follows the runs."""
        own = TextRun(own_id, prompt_tokens - self.tokens)
        return tuple(chain.from_iterable(repeat(run.text_id, run.tokens) for run in (*self.runs, own)))

    def then(self, *runs: TextRun) -> "PromptShape":
        """Return the shape with `runs` after its own."""
        return PromptShape((*self.runs, *runs))


OWN_TEXT = PromptShape()
"""The shape of a prompt that shares nothing."""
