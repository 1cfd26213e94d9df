"""Two devices answer as one does, token for token, whatever is asked; and nothing is left of them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import peft
import pytest

from engine import LLM, SamplingParams
from engine.demo.embedded import TASKS, adapter_folders, held_out_inputs
from engine.errors import InvalidConfig, WorkersFailed
from engine.offline.result import Result
from engine.serve import main
from lora.errors import AdapterRefused
from lora.target_modules import OUTER_SITES, SITES
from tests.e2e.test_engine_oracle import ADAPTERS
from tests.engine.tensor_parallel.processes import Watched, workers_of
from tests.forked_process import ForkedProcess
from tests.oracles import hf
from tests.oracles.peft_model import write_adapter
from tests.oracles.tokenizer import write_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=5, n=2, max_tokens=6, ignore_eos=True, logprobs=2)
NAMES = [None, *ADAPTERS]
START_S, STOP_S = 120, 60
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _one_thread_each() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint (`base`) and a PEFT folder for each of ADAPTERS."""
    folder = tmp_path_factory.mktemp("model")
    base = hf.build("llama-3")
    hf.save(base, folder / "base")
    write_tokenizer(folder / "base")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        write_adapter(base, folder / name, config, seed)
    return folder


def prompts_of(lengths: list[int], seed: int = 11) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 300) for _ in range(length)] for length in lengths]


LENGTHS = [1, 2, 15, 16, 17, 31, 64, 300, 40, 5, 9, 120, 33, 77, 3, 250, 18, 60]
PROMPTS = prompts_of(LENGTHS)
MIX = [NAMES[i % len(NAMES)] for i in range(len(PROMPTS))]


def build(model: Path, size: int, **options: Any) -> LLM:
    loras = {name: model / name for name in ADAPTERS}
    sizes: dict[str, Any] = {"kv_cache_bytes": 1 << 24, "adapter_bytes": 1 << 24, **options}
    return LLM(model / "base", loras, dtype="float32", tensor_parallel_size=size, **sizes)


def tokens(results: list[Result]) -> list[list[tuple[int, ...]]]:
    return [[output.token_ids for output in result.outputs] for result in results]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[tuple[int, ...]]]:
    """One device's tokens: greedy under the mix, then sampled."""
    llm = build(model, 1)
    found = tokens(llm.generate(PROMPTS, GREEDY, MIX)) + tokens(llm.generate(PROMPTS, SAMPLED, MIX))
    llm.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["roomy", "chunked", "preempted", "evicting"])
def test_two_devices_answer_as_one(way: str, model: Path, expected: list[list[tuple[int, ...]]]) -> None:
    block = 16 * 3 * 2 * 1 * 16 * 4  # of one device: 16 tokens, 3 layers, keys and values, a head of 16
    ways: dict[str, dict[str, int]] = {
        "roomy": {},
        "chunked": {"max_num_batched_tokens": 48},
        "preempted": {"kv_cache_bytes": 24 * block},
        "evicting": {"adapter_bytes": 3 << 19},
    }
    llm = build(model, 2, **ways[way])
    assert llm.engine.workers is not None
    first = llm.generate(PROMPTS, GREEDY, MIX)
    assert tokens(first) == expected[: len(PROMPTS)]
    assert tokens(llm.generate(PROMPTS, SAMPLED, MIX)) == expected[len(PROMPTS) :]
    again = llm.generate(PROMPTS, GREEDY, MIX)
    assert tokens(again) == expected[: len(PROMPTS)]
    assert (way == "preempted") == (llm.engine.core.live().preemptions > 0)
    assert (way == "evicting") == (llm.engine.store.stats().evictions > 0)
    if way == "roomy":
        assert sum(result.cached_tokens for result in again) > 600
    assert llm.engine.core.block_stats().used == 0
    workers = workers_of(os.getpid())
    assert len(workers) == 1
    watched = [Watched(worker) for worker in workers]
    llm.close()
    assert all(each.wait() for each in watched)


@pytest.mark.slow
def test_adapters_come_and_go_until_a_worker_dies_which_ends_the_engine_with_one_clear_error(
    model: Path, expected: list[list[tuple[int, ...]]]
) -> None:
    llm = LLM(
        model / "base", dtype="float32", tensor_parallel_size=2, kv_cache_bytes=1 << 24, adapter_bytes=1 << 22
    )
    registry = llm.engine.store.registry
    for name in ("r5", "r128", "r24"):
        registry.load("tenant", model / name)
        asked = [i for i, mixed in enumerate(MIX) if mixed in (name, None)]
        adapters = [MIX[i] and "tenant" for i in asked]
        found = tokens(llm.generate([PROMPTS[i] for i in asked], GREEDY, adapters))
        assert found == [expected[i] for i in asked]
    registry.unload("tenant")
    with pytest.raises(LookupError, match="tenant"):
        llm.generate([[5]], GREEDY, "tenant")
    with pytest.raises(AdapterRefused, match="no adapter_config"):
        registry.load("tenant", model / "base")
    assert tokens(llm.generate([PROMPTS[0]], GREEDY)) == [expected[0]]
    registry.load("r5", model / "r5")
    llm.generate(PROMPTS[:3], GREEDY, "r5")
    (worker,) = workers_of(os.getpid())
    dead = Watched(worker)
    os.kill(worker, signal.SIGKILL)
    assert dead.wait()
    for _ in range(2):
        with pytest.raises(WorkersFailed, match=r"process 1 of the 2 .* ended by signal 9"):
            llm.generate(PROMPTS[:3], GREEDY)
    with pytest.raises(WorkersFailed, match="process 1 of the 2"):
        registry.load("another", model / "r24")
    assert llm.engine.core.block_stats().used == 0
    llm.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-head-dim"])
def test_families_answer_as_on_one_device(family: str, tmp_path: Path) -> None:
    """A bias and a tied head; norms of queries and keys; one kv head that both devices have."""
    base = hf.build(family)
    hf.save(base, tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules=[*SITES, *OUTER_SITES])
    loras = {"a": write_adapter(base, tmp_path / "a", config, seed=5)}
    prompts, adapters = prompts_of([3, 14, 20, 33], seed=3), [None, "a", "a", None]
    found = []
    for size in (1, 2):
        llm = LLM(
            tmp_path / "base", loras, dtype="float32", tensor_parallel_size=size, kv_cache_bytes=1 << 22,
            adapter_bytes=1 << 22,
        )  # fmt: skip
        found.append(tokens(llm.generate(prompts, GREEDY, adapters)))
        llm.close()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("size", "remedy"),
    [(3, r"tensor_parallel_size=3 .* can be cut into 1, 2, 4 parts"), (8, "1, 2, 4 parts")],
)
def test_a_size_that_cuts_no_whole_heads_is_refused(size: int, remedy: str, model: Path) -> None:
    with pytest.raises(InvalidConfig, match=remedy):
        build(model, size)


@pytest.mark.slow
def test_a_worker_outlives_nobody(model: Path) -> None:
    script = (
        "from engine import LLM\n"
        f"llm = LLM({str(model / 'base')!r}, tensor_parallel_size=2, kv_cache_bytes=1<<22, adapter_bytes=1<<22)\n"
        "print('up', flush=True)\n"
        "input()\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == "up\n"
        workers = [Watched(pid) for pid in workers_of(first.pid)]
        assert len(workers) == 1
        first.kill()
        assert all(worker.wait() for worker in workers)


class Server:
    """`python -m engine.serve --tensor-parallel-size 2` over the embedded model."""

    def __init__(self, log: Path) -> None:
        self.log = log
        options = ["--port", "0", "--no-progress", "--dtype", "float32"]
        sizes = ["--kv-cache-bytes", "16MiB", "--adapter-bytes", "16MiB", "--tensor-parallel-size", "2"]
        self.process = ForkedProcess(main, ([*options, *sizes],), os.environ, log)
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        assert found, f"the server said {line!r} instead of its address: {log.read_text()}"
        self.url = found[0]
        self.workers = [Watched(pid) for pid in workers_of(self.process.pid)]
        assert len(self.workers) == 1

    def ask(self, model: str, text: str, **fields: object) -> str:
        """The answer to a chat of one message. Raises HTTPError."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0} | fields
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=START_S) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]

    def wait(self) -> int:
        """The exit code, once it has ended with all its processes."""
        code = self.process.wait(STOP_S)
        self.process.stdout.close()
        assert all(worker.wait() for worker in self.workers)
        return code


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path / "log")
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.wait()


def test_the_server_answers_over_two_devices_and_stops_with_a_signal(server: Server) -> None:
    assert adapter_folders()
    for task in TASKS:
        text = held_out_inputs(task, 1, seed=2)[0]
        assert server.ask(task.name, text, max_tokens=16) == task.answer(text)
        assert server.ask("demo", text, max_tokens=16) == text
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_the_server_stops_when_a_worker_dies(server: Server) -> None:
    assert server.ask("demo", "planet", max_tokens=16) == "planet"
    os.kill(server.workers[0].pid, signal.SIGKILL)
    assert server.wait() == 1
    assert (
        "process 1 of the 2 that compute together failed (it was ended by signal 9)" in server.log.read_text()
    )
    with pytest.raises(OSError, match="refused") as refused:
        server.ask("demo", "planet")
    assert not isinstance(refused.value, HTTPError)
