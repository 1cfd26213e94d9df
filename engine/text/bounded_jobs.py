"""Answer jobs in a process whose processor time and memory the operating system bounds.

Programs that do what strangers wrote, such as templates and schemas, run so. It imports the standard library alone, so
that they start quickly.
"""

import json
import resource
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

LENGTH = struct.Struct("<Q")


def serve_jobs(
    answer: Callable[[Mapping[str, Any]], object], descriptor: int, most_cpu_s: float, most_bytes: int
) -> None:
    """Answer the JSON objects that come over a socket, each with a JSON value, until its other end closes.

    A job that takes more than `most_cpu_s` of processor time ends the process by SIGPROF. What goes beyond `most_bytes`
    of memory fails in it.
    """
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    with socket.socket(fileno=descriptor) as end, end.makefile("rb") as jobs, end.makefile("wb") as answers:
        while len(header := jobs.read(LENGTH.size)) == LENGTH.size:
            job = json.loads(jobs.read(LENGTH.unpack(header)[0]))
            # Its signal ends a process that has no handler for it.
            signal.setitimer(signal.ITIMER_PROF, most_cpu_s)
            told = json.dumps(answer(job)).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
            answers.write(LENGTH.pack(len(told)) + told)
            answers.flush()
