"""The load generators ab and wrk: whatever they count as failed must be nothing."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.clients.probe import WORD, Probe, expect, main

REQUESTS = 40


def program(probe: Probe) -> None:
    """Try both, with a completion of an adapter and with the list of models."""
    probe.version = version("ab", "-V") + ", " + version("wrk", "-v")
    body = {"model": "upper", "prompt": WORD, "max_tokens": 4, "temperature": 0}
    with tempfile.TemporaryDirectory() as name:
        payload, script = Path(name) / "body.json", Path(name) / "post.lua"
        payload.write_text(json.dumps(body))
        script.write_text(
            f'wrk.method = "POST"\nwrk.body = [[{json.dumps(body)}]]\n'
            'wrk.headers["Content-Type"] = "application/json"\n'
        )
        apache_bench(probe, payload)
        wrk(probe, script)


def apache_bench(probe: Probe, payload: Path) -> None:
    """Send a number of requests by HTTP/1.0, with and without keeping the connection."""
    post = ("-p", str(payload), "-T", "application/json")
    for what, options in (
        ("ab, a completion", post),
        ("ab, a completion with keep-alive", ("-k", *post)),
        ("ab, /v1/models with keep-alive", ("-k",)),
    ):
        with probe.tries(what):
            path = "completions" if post[0] in options else "models"
            said = run(
                probe, "ab", "-n", str(REQUESTS), "-c", "4", "-l", *options, f"{probe.base_url}/{path}"
            )
            expect(count(r"Complete requests:\s+(\d+)", said), REQUESTS)
            expect(count(r"Failed requests:\s+(\d+)", said), 0)
            expect(count(r"Non-2xx responses:\s+(\d+)", said), 0)


def wrk(probe: Probe, script: Path) -> None:
    """Send as much as four connections take for a few seconds, by HTTP/1.1 with keep-alive."""
    for what, options, path in (
        ("wrk, a completion", ("-s", str(script)), "completions"),
        ("wrk, /v1/models", (), "models"),
    ):
        with probe.tries(what):
            said = run(probe, "wrk", "-t", "1", "-c", "4", "-d", "4s", *options, f"{probe.base_url}/{path}")
            assert count(r"(\d+) requests in", said) > 0
            expect(count(r"Non-2xx or 3xx responses: (\d+)", said), 0)
            expect(re.findall(r"Socket errors: .*", said), [])


def version(command: str, option: str) -> str:
    """Read a command's version; wrk prints its own with status 1."""
    said = subprocess.run([command, option], capture_output=True, text=True)
    found = re.search(r"\d+(?:\.\d+)+", said.stdout + said.stderr)
    return found[0] if found else "?"


def run(probe: Probe, command: str, *arguments: str) -> str:
    """Run a command with the key, and return what it prints. Raises CalledProcessError."""
    key = ("-H", f"Authorization: Bearer {probe.key}")
    ended = subprocess.run([command, *key, *arguments], stdout=subprocess.PIPE, text=True, timeout=120)
    print(ended.stdout, file=sys.stderr)
    ended.check_returncode()
    return ended.stdout


def count(pattern: str, said: str) -> int:
    """Read a number; what is not mentioned is none."""
    found = re.search(pattern, said)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    main(program)
