"""Find where in a prompt an activated LoRA (aLoRA) begins to act. Knows token ids only.

An aLoRA acts on the tokens from its invocation on; those before are computed by the base model. So their K/V are the
base's own, and one reading of a conversation serves the base and all such adapters (Greenewald et al., arXiv
2504.12397). The rules are PEFT's (`calculate_alora_offsets`). The last occurrence in the prompt counts, and its first
token is the first that the adapter acts on. Without an occurrence the adapter does not act at all.
"""

from collections.abc import Sequence

NEVER = 1 << 62
"""A position that no token has."""

MOST_INVOCATION_TOKENS = 256


def activation(invocation: Sequence[int], prompt_token_ids: Sequence[int]) -> int:
    """Return the position of the first token that an adapter acts on; NEVER if its invocation does not occur.

    An adapter without invocation tokens acts on all tokens, from position 0 on.
    """
    if not invocation:
        return 0
    wanted = tuple(reversed(invocation))
    backwards = tuple(reversed(prompt_token_ids))
    first, size = wanted[0], len(wanted)
    start = 0
    while True:
        try:
            start = backwards.index(first, start)
        except ValueError:
            return NEVER
        if backwards[start : start + size] == wanted:
            return len(backwards) - start - size
        start += 1
