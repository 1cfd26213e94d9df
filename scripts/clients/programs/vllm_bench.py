"""The request functions of `vllm bench serve`, from vLLM's released package, with adapters chosen in turn.

The command itself imports all of vLLM, gigabytes of it. Its requests are all in one file without such imports, which
is loaded here as it is.
"""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import asyncio
import importlib.util
import itertools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp

from scripts.clients.probe import LONG_TOKENS, REVERSED, UPPER, WORD, Probe, expect, main

OUTPUT_TOKENS = len(WORD) + 1


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
