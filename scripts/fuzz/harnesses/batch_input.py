"""Try spoilt batch files: every line gets one result, no result is a failure of the server, and a run can go on."""

import json
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.batch import Summary, run_batch
from engine.config.config import BatchConfig
from engine.errors import InvalidConfig
from scripts.fuzz.case import Case, Finding
from scripts.fuzz.harnesses.sound_bodies import SOUND
from scripts.fuzz.live_node import ENGINE, LiveNode
from scripts.fuzz.mutators import spoilt_bytes, spoilt_json

_MOST_LINES = 5
_FIELDS = ("custom_id", "method", "url", "body", "metadata")


class BatchTarget:
    """An engine that answers one file of batch lines at a time, twice."""

    def __init__(self) -> None:
        """Start the engine."""
        self._node = LiveNode()
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def whole(self) -> list[Case]:
        """Return files of one line that is answered."""
        chance = random.Random(1)
        return [Case("lines", json.dumps(_line(chance, number)).encode()) for number in range(20)]

    def draw(self, chance: random.Random) -> Case:
        """Draw a file of a few lines, some of them spoilt."""
        count = chance.randrange(1, _MOST_LINES + 1)
        lines = [_written(chance, _line(chance, number)) for number in range(count)]
        content = b"".join(line + chance.choice((b"\n", b"\n", b"\r\n", b"\n\n")) for line in lines)
        return Case("lines", spoilt_bytes(chance, content) if chance.random() < 0.2 else content)

    def run(self, case: Case) -> str:
        """Answer the file, then once more."""
        config = BatchConfig(self._folder / "in", self._folder / "out", ENGINE, in_flight=2)
        config.input.write_bytes(case.content)
        config.output.unlink(missing_ok=True)
        try:
            summary = self._node.wait(run_batch(self._node.engine, config))
        except InvalidConfig:
            return "refused"
        results = [json.loads(line) for line in config.output.read_bytes().splitlines()]
        _judge(summary, results)
        before = config.output.read_bytes()
        again = self._node.wait(run_batch(self._node.engine, config))
        if again.answered or again.errors or config.output.read_bytes() != before:
            raise Finding(f"the second run did lines again: {again}")
        retried = self._node.wait(run_batch(self._node.engine, replace(config, retry_errors=True)))
        if retried.errors != summary.errors or retried.skipped != summary.answered:
            raise Finding(f"the run that does errors again did others: {retried} after {summary}")
        return "with errors" if summary.errors else "answered"

    def check(self) -> None:
        """Raise Finding if the engine holds anything of the requests."""
        self._node.check()

    def close(self) -> None:
        """Stop the engine and remove the files."""
        self._node.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _line(chance: random.Random, number: int) -> dict[str, Any]:
    url = chance.choice(list(SOUND))
    body = SOUND[url](chance, False)
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}


def _written(chance: random.Random, line: Mapping[str, Any]) -> bytes:
    spoilt = spoilt_json(chance, line, _FIELDS).replace(b"\n", b" ")
    return spoilt if chance.random() < 0.2 else json.dumps(line).encode()


def _judge(summary: Summary, results: list[Mapping[str, Any]]) -> None:
    if len(results) != summary.answered + summary.errors:
        raise Finding(f"{len(results)} results of {summary}")
    for result in results:
        response: Any = result["response"]
        if response is None and not result["error"]["message"]:
            raise Finding(f"an error that says nothing: {result}")
        if response is not None and response["status_code"] >= 500:
            raise Finding(f"a failure of the server: {result}")
