"""Try grammars in a process that may be ended at any time: `python grammar_worker.py DESCRIPTOR CPU_S BYTES`.

A form comes with a request, and the library bounds what it costs in part only: a few characters can take a minute or
all memory. So the operating system bounds this process.
"""

import sys
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.text.bounded_jobs import serve_jobs

_BYTES = 256


class _ByteTokens:
    """A vocabulary of all bytes and an end token: what a form costs depends little on the vocabulary."""

    bos_token_id = None
    eos_token_id = _BYTES
    tokens = (*(bytes([byte]) for byte in range(_BYTES)), b"<end>")
    special_token_ids = (_BYTES,)

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def refusal(job: Mapping[str, Any], tokenizer: LLTokenizer) -> str:
    """Compile `job`'s grammar; return why it cannot be, "" if it can."""
    try:
        limits = LLParserLimits(**job["limits"])
        matcher = LLMatcher(tokenizer, job["grammar"], log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
    except Exception as error:  # noqa: BLE001 - whatever the library raises, it is the grammar's fault
        return str(error) or type(error).__name__
    return matcher.get_error() if matcher.is_error() else ""


if __name__ == "__main__":
    byte_tokenizer = LLTokenizer(TokenizerWrapper(_ByteTokens()))
    serve_jobs(
        lambda job: refusal(job, byte_tokenizer), int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    )
