"""Try grammars in a process that may be ended at any time: `python grammar_worker.py DESCRIPTOR CPU_S BYTES`.

A form comes with a request, and the library bounds what it costs in part only: a few characters can take a minute or
all memory. So the operating system bounds this process. It imports nothing of the project, so that it starts quickly.
"""

import json
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

_LENGTH = struct.Struct("<Q")
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


def serve(jobs: BinaryIO, answers: BinaryIO, most_cpu_s: float) -> None:
    """Answer jobs until the other end closes."""
    tokenizer = LLTokenizer(TokenizerWrapper(_ByteTokens()))
    while len(header := jobs.read(_LENGTH.size)) == _LENGTH.size:
        job = json.loads(jobs.read(_LENGTH.unpack(header)[0]))
        # Its signal ends a process that has no handler for it.
        signal.setitimer(signal.ITIMER_PROF, most_cpu_s)
        answer = json.dumps(refusal(job, tokenizer)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(_LENGTH.pack(len(answer)) + answer)
        answers.flush()


def main(descriptor: int, most_cpu_s: float, most_bytes: int) -> None:
    """Bound this process, and serve the socket that has this descriptor."""
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    with socket.socket(fileno=descriptor) as end, end.makefile("rb") as jobs, end.makefile("wb") as answers:
        serve(jobs, answers, most_cpu_s)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
