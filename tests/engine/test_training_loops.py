"""What training loops ask of a server, request by request, in the ways of SkyRL, prime-rl and verl."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.assembly.assembly import assemble
from engine.async_engine import AsyncEngine
from engine.config.config import EngineConfig
from engine.demo.embedded import adapter_folders
from engine.metrics.telemetry import Telemetry
from tests.engine.api.session import ApiSession, events, session

EMBEDDED = adapter_folders()
Visit = Callable[[ApiSession, AsyncEngine, Path], Awaitable[object]]


def serve(folder: Path, visit: Visit, **options: Any) -> None:
    """Run `visit` with the embedded model's server, whose folder of adapters is `folder`, empty at start."""

    async def run() -> None:
        config = EngineConfig(
            dtype="float32", kv_cache_bytes=32 << 20, progress=False, self_test=False,
            lora_dir=folder, lora_dir_poll_s=3600.0, **options,
        )  # fmt: skip
        engine = AsyncEngine(assemble(config), Telemetry(), 64)
        await engine.start()
        try:
            async with session(engine, roots=(folder, EMBEDDED["sort"].parent)) as api:
                await visit(api, engine, folder)
        finally:
            await engine.close()

    folder.mkdir()
    asyncio.run(asyncio.wait_for(run(), 120))


def publish(folder: Path, name: str, task: str) -> Path:
    """Unpack a checkpoint beside the folder and rename it into place, as SkyRL does."""
    part = folder / f".{name}.part"
    shutil.copytree(EMBEDDED[task], part)
    return part.rename(folder / name)


async def tokens_of(api: ApiSession, task: str) -> list[int]:
    """The prompt of a task's adapter, as token ids."""
    messages = [{"role": "user", "content": "garden"}]
    return (await api.post("/tokenize", {"messages": messages})).json["tokens"]


async def scored(api: ApiSession, model: str, token_ids: list[int]) -> list[float]:
    """The log-probability of each token but the first, by a prefill of all."""
    body = {"model": model, "prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0}
    entries = (await api.post("/v1/completions", body)).json["choices"][0]["prompt_logprobs"]
    pairs = zip(token_ids[1:], entries[1:], strict=True)
    return [entry[str(token_id)]["logprob"] for token_id, entry in pairs]


def rows(engine: AsyncEngine, since: int) -> list[tuple[int, int, int]]:
    """Sequence, start and tokens of each slice of the steps after step `since`, in order."""
    steps = [step for step in reversed(engine.recent_steps()) if step.number > since]
    return [(part.sequence, part.start, part.tokens) for step in steps for part in step.slices]


async def sample(api: ApiSession, model: str, prompt: list[int], **fields: Any) -> Mapping[str, Any]:
    """SkyRL's request for samples."""
    body = {
        "model": model, "prompt": prompt, "n": 4, "seed": 7, "max_tokens": 6, "temperature": 1.0, "top_p": 1.0,
        "top_k": -1, "logprobs": True, "stream": False, "return_token_ids": True, "prompt_logprobs": 2,
    }  # fmt: skip
    headers = {"Authorization": "Bearer EMPTY", "X-Session-ID": "rollout-1"}
    response = await api.post("/v1/completions", body | fields, headers=headers)
    assert response.status == 200, response.body
    return response.json


def test_checkpoints_of_several_ranks_are_sampled_the_moment_that_they_are_unpacked(tmp_path: Path) -> None:
    async def visit(api: ApiSession, engine: AsyncEngine, folder: Path) -> None:
        prompt = await tokens_of(api, "reverse")
        for model, task in (("m1_000010", "reverse"), ("m2_000007", "increment"), ("m1_000020", "upper")):
            missing = await api.post("/v1/completions", {"model": model, "prompt": prompt})
            assert (missing.status, missing.error["code"]) == (404, "model_not_found")
            publish(folder, model, task)
            answer = await sample(api, model, prompt)
            assert answer["model"] == model
            assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
            for choice in answer["choices"]:
                drawn, told = choice["token_ids"], choice["logprobs"]["token_logprobs"]
                assert choice["finish_reason"] == ("length" if len(drawn) == 6 else "stop")
                assert 0 < len(drawn) == len(told) <= 6
                by_prefill = await scored(api, model, prompt + drawn)
                assert told == pytest.approx(by_prefill[len(prompt) - 1 :], abs=2e-4)
                of_prompt = choice["prompt_logprobs"]
                assert (len(of_prompt), of_prompt[0]) == (len(prompt), None)
                assert all(2 <= len(entry) <= 3 for entry in of_prompt[1:])
            assert (await sample(api, model, prompt))["choices"] == answer["choices"]
        listed = {model["id"] for model in (await api.send("GET", "/v1/models")).json["data"]}
        assert {"m1_000010", "m2_000007", "m1_000020"} <= listed

    serve(tmp_path / "lora", visit)


def test_the_samples_of_a_prompt_share_its_prefill(tmp_path: Path) -> None:
    async def visit(api: ApiSession, engine: AsyncEngine, folder: Path) -> None:
        prompt = [7 + number % 50 for number in range(33)]
        publish(folder, "m_1", "sort")
        before = engine.recent_steps()[0].number if engine.recent_steps() else 0
        await sample(api, "m_1", prompt, max_tokens=1, prompt_logprobs=None)
        (first, *others) = rows(engine, before)
        assert first == (0, 0, 33)
        assert [sequence for sequence, _, _ in others] == [1, 2, 3]
        assert all(start + tokens == 33 and tokens <= 16 for _, start, tokens in others)

    serve(tmp_path / "lora", visit)


def test_versions_are_loaded_in_place_and_beside_each_other(tmp_path: Path) -> None:
    async def visit(api: ApiSession, engine: AsyncEngine, folder: Path) -> None:
        prompt = await tokens_of(api, "upper")

        async def load(name: str, task: str, **fields: object) -> int:
            body = {"lora_name": name, "lora_path": str(EMBEDDED[task])} | fields
            return (await api.post("/v1/load_lora_adapter", body)).status

        async def greedy(name: str) -> list[int]:
            sampling = {"temperature": 0, "max_tokens": 8, "logprobs": 1}
            body = {"model": name, "token_ids": prompt, "sampling_params": sampling}
            return (await api.post("/inference/v1/generate", body)).json["choices"][0]["token_ids"]

        tasks = ("upper", "reverse", "rot13")
        expected = {}
        for task in tasks:
            assert await load(f"policy@{task}", task) == 200
            expected[task] = await greedy(f"policy@{task}")
        assert len({tuple(tokens) for tokens in expected.values()}) == len(tasks)
        assert await load("policy", "sort", load_inplace=False) == 200
        assert await load("policy", "sort", load_inplace=False) == 400
        for step, task in enumerate((*tasks, *tasks)):
            assert await load("policy", task, load_inplace=True, lora_int_id=step) == 200
            assert await greedy("policy") == expected[task]
        together = await asyncio.gather(*(greedy(f"policy@{task}") for task in tasks), greedy("policy"))
        assert together == [*(expected[task] for task in tasks), expected["rot13"]]
        for task in tasks:
            body = {"lora_name": f"policy@{task}"}
            assert (await api.post("/v1/unload_lora_adapter", body)).status == 200

    serve(tmp_path / "lora", visit)


def test_logprobs_are_the_model_s_or_those_of_the_draw_as_server_and_request_say(tmp_path: Path) -> None:
    async def visit(api: ApiSession, engine: AsyncEngine, folder: Path) -> None:
        sampling = {"max_tokens": 3, "temperature": 0.7, "top_k": 1, "logprobs": 1, "seed": 1}

        async def told(**fields: object) -> list[float]:
            body = {"token_ids": [7, 8, 9], "sampling_params": sampling | fields}
            choice = (await api.post("/inference/v1/generate", body)).json["choices"][0]
            return [entry["logprob"] for entry in choice["logprobs"]["content"]]

        assert (
            await told()
            == await told(logprobs_mode="processed_logprobs")
            == pytest.approx([0, 0, 0], abs=1e-6)
        )
        raw = await told(logprobs_mode="raw_logprobs")
        assert max(raw) < -1e-6
        chat = {
            "model": "demo",
            "messages": [{"role": "user", "content": "garden"}],
            "logprobs": True,
            **sampling,
        }
        refused = await api.post(
            "/v1/completions", {"model": "demo", "prompt": "a", "logprobs_mode": "raw_logits"}
        )
        assert (refused.status, refused.error["param"]) == (400, "logprobs_mode")
        answer = await api.post(
            "/v1/chat/completions", chat | {"logprobs": True, "logprobs_mode": "raw_logprobs"}
        )
        assert answer.status == 200

    serve(tmp_path / "lora", visit, logprobs_mode="processed_logprobs")


def test_every_answer_tells_the_version_that_gave_it(tmp_path: Path) -> None:
    async def visit(api: ApiSession, engine: AsyncEngine, folder: Path) -> None:
        async def version(path: str, model: str, **fields: object) -> str | None:
            whole = (await api.post(path, {"model": model} | fields)).json["system_fingerprint"]
            chunks = events((await api.post(path, {"model": model, "stream": True} | fields)).body)[:-1]
            assert {chunk["system_fingerprint"] for chunk in chunks} == {whole}
            return whole

        async def versions(model: str) -> set[str | None]:
            return {
                await version("/v1/completions", model, prompt=[7, 8], max_tokens=2, n=2),
                await version(
                    "/v1/chat/completions", model, messages=[{"role": "user", "content": "a"}], max_tokens=2
                ),
                await version(
                    "/inference/v1/generate", model, token_ids=[7], sampling_params={"max_tokens": 2}
                ),
            }

        assert await versions("demo") == {None}
        told: set[str | None] = set()
        for task in ("upper", "reverse", "upper"):
            body = {"lora_name": "policy", "lora_path": str(EMBEDDED[task]), "load_inplace": True}
            assert (await api.post("/v1/load_lora_adapter", body)).status == 200
            record = (await api.send("GET", "/v1/adapters/policy")).json
            (found,) = await versions("policy")
            assert found == record["version"][:16]
            told.add(found)
        assert len(told) == 2

    serve(tmp_path / "lora", visit)


def test_a_salt_keeps_a_prompt_s_k_v_apart(tmp_path: Path) -> None:
    async def visit(api: ApiSession, engine: AsyncEngine, folder: Path) -> None:
        ids = [7 + number % 50 for number in range(33)]
        bodies: dict[str, dict[str, Any]] = {
            "/inference/v1/generate": {"token_ids": ids, "sampling_params": {"max_tokens": 1}},
            "/v1/completions": {"model": "demo", "prompt": ids, "max_tokens": 1},
        }
        for path, body in bodies.items():

            async def cached(path: str = path, body: dict[str, Any] = body, **fields: object) -> int:
                usage = (await api.post(path, body | fields)).json["usage"]
                return usage["prompt_tokens_details"]["cached_tokens"]

            await cached()
            found = [await cached(), *[await cached(cache_salt=path + salt) for salt in ("a", "a", "b", "b")]]
            assert found == [32, 0, 32, 0, 32]
            for wrong in ("", "x" * 513, 5):
                assert (await api.post(path, body | {"cache_salt": wrong})).error["param"] == "cache_salt"

    serve(tmp_path / "lora", visit)
