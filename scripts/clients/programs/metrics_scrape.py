"""Prometheus' own linter promtool on the server's metrics."""

import json
import subprocess
import sys
from urllib.request import Request, urlopen

from scripts.clients.probe import WORD, Probe, expect, main


def program(probe: Probe) -> None:
    """Make every kind of series, and check what is exposed."""
    said = subprocess.run(["promtool", "--version"], capture_output=True, text=True, check=True)
    probe.version = said.stdout.split()[2]
    with probe.tries("a request of two adapters"):
        for model in ("reverse", "upper"):
            body = json.dumps({"model": model, "prompt": WORD, "max_tokens": 4}).encode()
            headers = {"Authorization": f"Bearer {probe.key}", "Content-Type": "application/json"}
            urlopen(Request(f"{probe.base_url}/completions", body, headers), timeout=60).close()
    with probe.tries("promtool check metrics"):
        text = probe.metrics()
        assert 'adapter="reverse"' in text
        ended = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
        )
        print(ended.stdout, ended.stderr, file=sys.stderr)
        expect((ended.returncode, ended.stdout + ended.stderr), (0, ""))


if __name__ == "__main__":
    main(program)
