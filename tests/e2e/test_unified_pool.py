"""K/V and adapters in one arena: each grows into what the other leaves unused, and gives it back."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.config.config import UnifiedMemory
from engine.errors import InvalidConfig
from tests.fakes.host_device import put_on_device
from tests.oracles.peft_model import write_llama

RANKS = (4, 8, 16, 24, 32, 8, 16, 4, 8, 16, 24, 32)
BLOCK_BYTES = 16 * 3 * 2 * 2 * 16 * 4
KV_BLOCKS = 32
SEEDS = 3
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(
        tmp_path_factory.mktemp("shared"), {f"loras/{seed}": rank for seed, rank in enumerate(RANKS)}
    )


def make(
    folder: Path, shared: UnifiedMemory, kv_blocks: int = KV_BLOCKS, adapter_bytes: int = 1 << 20
) -> LLM:
    return LLM(
        folder / "base",
        dtype="float32",
        lora_dir=folder / "loras",
        max_num_batched_tokens=64,
        max_model_len=128,
        kv_cache_bytes=kv_blocks * BLOCK_BYTES,
        adapter_bytes=adapter_bytes,
        adapter_patience_s=0.0,
        unified_memory=shared,
    )


def _traffic(
    seed: int, count: int = 40
) -> tuple[list[tuple[int, ...]], list[SamplingParams], list[str | None]]:
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(4, 300) for _ in range(rng.randint(1, 90))) for _ in range(count)]
    params = [SamplingParams(temperature=0.8, max_tokens=rng.randint(1, 30), seed=i) for i in range(count)]
    return prompts, params, [rng.choice([None, *map(str, range(len(RANKS)))]) for _ in range(count)]


def _check_line(llm: LLM) -> None:
    """Together the two sides hold the arena, whole and once."""
    memory = llm.engine.core._memory
    assert memory is not None
    division, blocks, pages = memory._split, memory._blocks, llm.engine.store.contents._pages
    assert blocks.held_blocks % division.blocks == 0
    quanta, rest = divmod(pages.num_pages, division.pages)
    assert (rest, quanta + memory.kv_quanta) == (0, division.quanta)
    assert division.least_kv <= memory.kv_quanta <= division.most_kv


def _kv_quanta(llm: LLM) -> int:
    assert llm.engine.core._memory is not None
    return llm.engine.core._memory.kv_quanta


def _watched(llm: LLM, watch: Callable[[], None]) -> LLM:
    """`watch` is called after every step."""
    step = llm.engine.core.step

    def watched():  # noqa: ANN202 - as step's
        result = step()
        watch()
        return result

    llm.engine.core.step = watched
    return llm


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[tuple[int, ...]]]:
    """The answers of memory that is not shared, by seed."""
    apart = make(folder, "off")
    found = [[r.outputs[0].token_ids for r in apart.generate(*_traffic(seed))] for seed in range(SEEDS)]
    apart.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["read at once", "lagging"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_answers_are_those_of_memory_that_is_not_shared(
    folder: Path, expected: list[list[tuple[int, ...]]], seed: int, late: bool
) -> None:
    shared = make(folder, "on")
    lines: set[int] = set()
    _watched(shared, lambda: (_check_line(shared), lines.add(_kv_quanta(shared)))[0])
    if late:
        put_on_device(shared, 16, 8)
    found = shared.generate(*_traffic(seed))
    assert [r.outputs[0].token_ids for r in found] == expected[seed]
    assert len(lines) > 1, "the line never moved: the test shows nothing"
    assert shared.engine.core.block_stats().used == 0
    shared.close()


def test_sequences_run_in_what_adapters_do_not_use(folder: Path) -> None:
    apart, shared = make(folder, "off", kv_blocks=16), make(folder, "on", kv_blocks=16)
    most = {"apart": 0, "shared": 0}
    for name, llm in (("apart", apart), ("shared", shared)):

        def watch(name: str = name, llm: LLM = llm) -> None:
            most[name] = max(most[name], llm.engine.core.live().running)

        _watched(llm, watch)
    prompts = [tuple(range(5 + i, 85 + i)) for i in range(16)]  # six blocks each
    expected, found = (llm.generate(prompts, GREEDY) for llm in (apart, shared))
    assert [r.outputs[0].token_ids for r in found] == [r.outputs[0].token_ids for r in expected]
    assert most["apart"] <= 3
    assert most["shared"] >= 8
    apart.close()
    shared.close()


def test_adapters_stay_in_what_sequences_do_not_use_and_make_way_for_them(folder: Path) -> None:
    llm = make(folder, "on", kv_blocks=128, adapter_bytes=1 << 19)
    at_first = _kv_quanta(llm)
    for name in map(str, range(len(RANKS))):
        llm.generate([(5, 6, 7)], GREEDY, name)
    stats = llm.engine.store.stats()
    assert stats.resident_bytes > 1 << 19, "more adapters stay than the adapters' own share holds"
    assert _kv_quanta(llm) < at_first
    resident = stats.resident
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, llm.engine.core.block_stats().used)
        _check_line(llm)

    _watched(llm, watch)
    long = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    llm.generate([tuple(range(5 + i, 35 + i)) for i in range(24)], long)  # eight blocks each
    assert most > 128, "K/V took back its share, and what the adapters did not use"
    assert llm.engine.store.stats().resident < resident
    llm.close()


def test_a_division_that_cannot_be_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"kv_cache_bytes.*share memory by quanta"):
        make(folder, "on", kv_blocks=2)
