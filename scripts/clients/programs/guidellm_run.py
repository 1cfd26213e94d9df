"""The benchmark guidellm, over both of OpenAI's ways to ask; every request must succeed and be counted."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.clients.probe import Probe, expect, main

GUIDELLM = Path(sys.executable).with_name("guidellm")
TOKENIZER = Path(__file__).parents[3] / "engine" / "demo" / "base"
REQUESTS, OUTPUT_TOKENS = 4, 8


def program(probe: Probe) -> None:
    """Try what the benchmark offers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with probe.tries("plain"):
            expect_measured(run(probe, folder, "demo", "/v1/completions"))
        with probe.tries("adapter"):
            expect_measured(run(probe, folder, "reverse", "/v1/chat/completions"))
        with probe.tries("stream"):
            measured = run(probe, folder, "upper", "/v1/chat/completions")
            expect_measured(measured)
            assert measured["time_to_first_token_ms"]["successful"]["mean"] > 0
        with probe.tries("error"):
            totals = run(probe, folder, "missing", "/v1/chat/completions")["request_totals"]
            expect((totals["successful"], totals["errored"] > 0), (0, True))


def run(probe: Probe, folder: Path, model: str, path: str) -> dict:
    """Run a benchmark of a few requests, two at a time, and return its metrics."""
    server = f"kind=openai_http,target={probe.url},model={model},api_key={probe.key},request_format={path}"
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    command = (
        *(GUIDELLM, "run", "--backend", server, "--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={OUTPUT_TOKENS}"),
        *("--tokenizer", f"kind=hf_auto,model={TOKENIZER}"),
        *("--output", f"kind=json,path={report}", "--disable-console"),
    )
    variables = {**os.environ, "HF_HOME": str(folder)}
    subprocess.run(command, env=variables, check=True, timeout=300, cwd=folder)
    return json.loads(report.read_text())["benchmarks"][0]["metrics"]


def expect_measured(metrics: dict) -> None:
    """Raise AssertionError unless all requests succeeded, with the tokens that were asked for."""
    totals = metrics["request_totals"]
    expect((totals["successful"], totals["errored"]), (REQUESTS, 0))
    expect(metrics["output_token_count"]["successful"]["mean"], float(OUTPUT_TOKENS))


if __name__ == "__main__":
    main(program)
