"""Simon Willison's command `llm`, configured by its file of further OpenAI models."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.clients.probe import CITIES, LONG_TOKENS, REVERSED, WORD, Probe, expect, expect_usage, main

LLM = Path(sys.executable).with_name("llm")
END = "257"
"""The embedded model's end token, which a long answer must not have."""

MODEL = """\
- model_id: {name}
  model_name: {name}
  api_base: "{url}"
  api_key_name: server
  supports_schema: true
  supports_tools: true
"""


def program(probe: Probe) -> None:
    """Try what the command offers."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("demo", "reverse", "upper", "missing")
        lines = [MODEL.format(name=name, url=probe.base_url) for name in names]
        (Path(folder) / "extra-openai-models.yaml").write_text("".join(lines))
        (Path(folder) / "keys.json").write_text(json.dumps({"server": probe.key}))
        home = {**os.environ, "LLM_USER_PATH": folder}
        prompts(probe, home)
        failures(probe, home)


class ServerRefused(Exception):
    """The command ended with an error that has the server's status and message."""


def run(home: dict[str, str], *arguments: str) -> str:
    """Run the command, and return what it prints. Raises ServerRefused for a 400, CalledProcessError else."""
    ended = subprocess.run([LLM, *arguments], env=home, capture_output=True, text=True, timeout=120)
    print(ended.stderr, file=sys.stderr)
    if ended.returncode and "Error code: 400 - " in ended.stderr:
        raise ServerRefused(ended.stderr)
    ended.check_returncode()
    return ended.stdout.strip()


def prompts(probe: Probe, home: dict[str, str]) -> None:
    """Prompt it in its ways; without --no-stream it streams."""
    with probe.tries("plain"):
        expect(run(home, "prompt", "-m", "demo", "--no-stream", "-o", "temperature", "0", WORD), WORD)
    with probe.tries("adapter"):
        expect(run(home, "prompt", "-m", "reverse", "--no-stream", "-o", "temperature", "0", WORD), REVERSED)
    with probe.tries("stream"):
        expect(run(home, "prompt", "-m", "reverse", "-o", "temperature", "0", WORD), REVERSED)
        logged = json.loads(run(home, "logs", "list", "--json", "-n", "1"))[0]
        expect_usage(logged["input_tokens"], logged["output_tokens"])
    with probe.tries("a conversation continued"):
        assert run(home, "prompt", "-m", "demo", "-c", "-o", "max_tokens", "8", WORD)
    with probe.tries("a system prompt"):
        assert run(home, "prompt", "-m", "demo", "-s", "Echo.", "-o", "max_tokens", "8", WORD)
    with probe.tries("stop"):
        expect(run(home, "prompt", "-m", "demo", "-o", "temperature", "0", "-o", "stop", "d", WORD), "gar")
    with probe.tries("cancel"), probe.sees_abort():
        long = ("-o", "max_tokens", str(LONG_TOKENS), "-o", "logit_bias", json.dumps({END: -100}))
        command = [LLM, "prompt", "-m", "upper", *long, WORD]
        with subprocess.Popen(command, env=home, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            process.kill()


def failures(probe: Probe, home: dict[str, str]) -> None:
    """Prompt for what must fail."""
    with probe.tries("error"):
        ended = subprocess.run(
            [LLM, "prompt", "-m", "missing", WORD], env=home, capture_output=True, text=True
        )
        expect((ended.returncode, "missing" in ended.stderr, "Traceback" in ended.stderr), (1, True, False))
    with probe.meets_limit("auto tools", "the embedded model's template has none", ServerRefused):
        run(home, "prompt", "-m", "demo", "-T", "llm_version", WORD)
    with probe.tries("schema"):
        answer = run(home, "prompt", "-m", "demo", "--schema", json.dumps(CITIES), WORD)
        expect(list(json.loads(answer)), ["city"])


if __name__ == "__main__":
    main(program)
