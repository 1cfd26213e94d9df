"""Record what a client's program tried and what came of it.

It runs in the client's environment, so it imports nothing but the standard library. The frame starts a program as

    python -P -m scripts.clients.programs.NAME --url http://127.0.0.1:8000 --key KEY --rpc 127.0.0.1:8001 --out FILE
"""

import argparse
import json
import logging
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.request import Request, urlopen

WORD, REVERSED, UPPER = "garden", "nedrag", "GARDEN"
"""What programs ask, and the right answers of the adapters `reverse` and `upper`; the base echoes."""

CITIES: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
"""A schema whose answers end soon, whatever a model of few words writes."""

LONG_TOKENS = 1500
"""A request of so many tokens runs for seconds: long enough to be cancelled."""

LONGEST_REASON = 300
Outcome = Literal["ok", "limit", "fails"]
"""A limit is something that is known not to work, and that the server or the client says so of."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One thing that was tried with a client."""

    what: str
    outcome: Outcome
    why: str = ""


class Probe:
    """Knows the server, and keeps the attempts of one program."""

    def __init__(self, url: str, key: str, rpc: str = "") -> None:
        self.url, self.key, self.rpc = url, key, rpc
        self.version = ""
        self.attempts: list[Attempt] = []

    @property
    def base_url(self) -> str:
        """The address as OpenAI's clients want it."""
        return f"{self.url}/v1"

    @contextmanager
    def tries(self, what: str) -> Generator[None, None, None]:
        """Record that this worked, or how it failed; the next attempt is made all the same."""
        try:
            yield
        except Exception as error:
            logging.exception(what)
            self._record(what, "fails", f"{type(error).__name__}: {error}")
        else:
            self._record(what, "ok")

    @contextmanager
    def meets_limit(self, what: str, reason: str, refusal: type[Exception]) -> Generator[None, None, None]:
        """Record a known limit, for `reason`, when the client raises `refusal`. Anything else is a failure."""
        try:
            yield
        except refusal:
            self._record(what, "limit", reason)
        except Exception as error:
            logging.exception(what)
            self._record(what, "fails", f"{type(error).__name__}: {error}")
        else:
            self._record(what, "fails", f"was not refused, though: {reason}")

    def _record(self, what: str, outcome: Outcome, why: str = "") -> None:
        why = why.replace(self.url, "http://SERVER").replace(self.rpc or self.url, "SERVER")
        why = " ".join(why.split())[:LONGEST_REASON]
        self.attempts.append(Attempt(what, outcome, why))
        print(f"{what}: {outcome} {why}", flush=True)

    def metrics(self) -> str:
        """Read the server's metrics."""
        request = Request(f"{self.url}/metrics", headers={"Authorization": f"Bearer {self.key}"})
        with urlopen(request, timeout=60) as response:
            return response.read().decode()

    def aborted(self) -> int:
        """Count the requests whose client left before their end."""
        counts = re.findall(
            r'^loraserve_requests_finished_total\{.*reason="abort".*\} (\S+)$', self.metrics(), re.MULTILINE
        )
        return int(sum(map(float, counts)))

    @contextmanager
    def sees_abort(self) -> Generator[None, None, None]:
        """Raise AssertionError unless the server has aborted a request soon after the block."""
        before = self.aborted()
        yield
        for _ in range(50):
            if self.aborted() > before:
                return
            time.sleep(0.2)
        raise AssertionError("the server did not abort the request of the client that left")


def expect(found: object, wanted: object) -> None:
    """Raise AssertionError unless the two are equal."""
    if found != wanted:
        raise AssertionError(f"{found!r} instead of {wanted!r}")


def expect_usage(prompt_tokens: int | None, output_tokens: int | None) -> None:
    """Raise AssertionError unless these are a usage of a one-word answer: its letters, and the end."""
    if not prompt_tokens or output_tokens != len(WORD) + 1:
        raise AssertionError(f"usage of {prompt_tokens} prompt tokens and {output_tokens} output tokens")


def batch_lines() -> bytes:
    """Write a file of two requests, `one` of `reverse` and `two` of `upper`."""
    asked = {"messages": [{"role": "user", "content": WORD}], "temperature": 0}
    head = {"method": "POST", "url": "/v1/chat/completions"}
    lines = [
        {"custom_id": name, **head, "body": {"model": model, **asked}}
        for name, model in (("one", "reverse"), ("two", "upper"))
    ]
    return "".join(f"{json.dumps(each)}\n" for each in lines).encode()


def answered_batch(look: Callable[[], Any]) -> Any:
    """Return the client's batch when it has ended. Raises AssertionError if it does not within 60 s."""
    for _ in range(300):
        if (batch := look()).status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.2)
    raise AssertionError("the batch has not ended")


def batch_answers(content: bytes) -> dict[str, str]:
    """Return what a file of results holds: texts by the names of their lines."""
    found = [json.loads(line) for line in content.splitlines()]
    return {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in found}


def main(program: Callable[[Probe], None]) -> None:
    """Run a client's program, and write what it tried to the file that the frame reads."""
    parser = argparse.ArgumentParser(description="Try a client; started by python -m scripts.clients.")
    parser.add_argument("--url", required=True, help="the server's address, without a path")
    parser.add_argument("--key", required=True, help="the server's API key")
    parser.add_argument("--rpc", default="", help="the server's HOST:PORT for gRPC")
    parser.add_argument("--out", required=True, type=Path, help="a file for what was tried, as JSON")
    given = parser.parse_args()
    probe = Probe(given.url, given.key, given.rpc)
    program(probe)
    report = {"version": probe.version, "tried": [asdict(attempt) for attempt in probe.attempts]}
    given.out.write_text(json.dumps(report))
