"""What a step may hold, and which requests could never run within that."""

from dataclasses import dataclass

from scheduler.blocks import BlockPool
from scheduler.request import Request


class RequestRefused(ValueError):
    """A request that could never run here, whatever else leaves; the message gives the numbers."""


@dataclass(frozen=True, slots=True)
class ServingDefaults:
    """What a node does unless told otherwise, alive or simulated: sequences that run at once and that may wait,
    rows of a step, tokens of a K/V block, and the patience of StepLimits."""

    max_num_seqs: int = 64
    max_waiting: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    adapter_patience_s: float = 2.0


DEFAULTS = ServingDefaults()
MOST_ROWS = 1 << 31  # no bound


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may hold, and how long a sequence may be passed over for want of its adapter.

    `max_num_seqs` sequences run at once, at most one for each of the `max_num_batched_tokens` rows. So each
    that has only its newest token to compute gets its row in every step. `max_model_len` bounds a sequence's
    prompt and output tokens together. The K/V of a prompt beyond `dynamic_rope_tokens` depend on its length, so
    that only prompts of one length may share them; None where they never do.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    adapter_patience_s: float = DEFAULTS.adapter_patience_s
    dynamic_rope_tokens: int | None = None

    def __post_init__(self) -> None:
        if min(self.max_num_seqs, self.max_num_batched_tokens) < 1 or self.max_model_len < 2:
            raise ValueError(f"{self}: give at least one sequence, one token a step and a length of two")
        if self.adapter_patience_s < 0:
            raise ValueError(f"adapter_patience_s={self.adapter_patience_s}: give 0 or more seconds")

    def rotated_by(self, prompt_tokens: int) -> int:
        """Return the prompt's length if its K/V depend on that, else 0."""
        longest = self.dynamic_rope_tokens
        return prompt_tokens if longest is not None and prompt_tokens > longest else 0

    @property
    def most_running(self) -> int:
        """Return how many sequences may run at once."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


def check_length(request: Request, longest: int) -> None:
    """Raise RequestRefused if the prompt is empty, or prompt and answer are more than `longest` tokens."""
    prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    if not prompt:
        raise RequestRefused(
            f"request_id={request.request_id!r} has an empty prompt: give at least one token"
        )
    if prompt + (max_tokens or len(request.drawn_token_ids) + 1) > longest:
        raise RequestRefused(f"{_told(request, longest)}: shorten the prompt or lower max_tokens")


def _told(request: Request, longest: int) -> str:
    """Return how long a request is; the first sentence is OpenAI's: clients know by it that the context is full."""
    prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    told = f"This model's maximum context length is {longest} tokens. However, the request has {prompt} in its prompt"
    return told + (f" and max_tokens={max_tokens}" if max_tokens else " and no max_tokens")


def check_request(request: Request, limits: StepLimits, blocks: BlockPool) -> None:
    """Raise RequestRefused if the prompt is empty or the request could not run even alone."""
    check_length(request, limits.max_model_len)
    prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    longest = prompt + max_tokens if max_tokens else limits.max_model_len
    needed = blocks.blocks_for(longest - 1)  # the last token is drawn but never computed
    if needed > blocks.num_blocks:
        raise RequestRefused(
            f"{_told(request, limits.max_model_len)}, which needs {needed} K/V blocks of {blocks.block_size} tokens "
            f"and there are {blocks.num_blocks}: keep prompt and max_tokens within "
            f"{blocks.capacity_tokens + 1} tokens together, or give the engine more K/V memory"
        )
