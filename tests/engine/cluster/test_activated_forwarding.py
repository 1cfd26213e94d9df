"""An activated LoRA through a router: the node finds where it acts, and shares what the base has read."""

import asyncio
from pathlib import Path

from engine.catalogue.base import CatalogueEntry
from engine.cluster.view import ClusterView
from engine.config.config import EngineConfig
from engine.output import RequestOutput
from scheduler.request import SamplingParams
from tests.engine.cluster.live_nodes import LiveNode, make_router
from tests.engine.test_activated_adapters import INVOCATION, activated

TEXT = tuple(20 + at % 7 for at in range(53))
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


async def _answer(output: RequestOutput) -> tuple[tuple[int, ...], int]:
    """Return the tokens of an answer, and how many of the prompt's the prefix cache supplied."""
    try:
        tokens = tuple([token_id async for delta in output for token_id in delta.token_ids])
        return tokens, output.cached_tokens
    finally:
        await output.aclose()


def test_answers_and_shared_blocks_are_those_of_one_engine(tmp_path: Path) -> None:
    config = EngineConfig(
        loras={"late": activated(tmp_path / "late")},
        dtype="float32", kv_cache_bytes=8 << 20, progress=False, self_test=False,
    )  # fmt: skip

    async def session() -> None:
        node = LiveNode.make("n0", config)
        member = await node.start()
        ref = node.engine.store.registry.resolve("late")
        assert ref.invocation == INVOCATION
        view = ClusterView({member.name: member}, {"late": CatalogueEntry("late", ref)}, known=True)
        client = make_router(view, node.engine)
        await client.start()
        try:
            while not client.forwarding.ready:
                await asyncio.sleep(0.01)
            base = client.model_name
            asked = [
                (base, TEXT),
                ("late", (*TEXT, *INVOCATION, 30)),
                ("late", (*TEXT, 30)),
                (base, (*TEXT, 30)),
            ]
            found = [
                await _answer(await client.submit(name, prompt, GREEDY, f"r{at}"))
                for at, (name, prompt) in enumerate(asked)
            ]
            again = [
                await _answer(await node.front.submit(name, prompt, GREEDY, f"d{at}"))
                for at, (name, prompt) in enumerate(asked)
            ]
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in again]
            assert [cached for _, cached in found] == [0, 48, 48, 48]
            assert found[2][0] == found[3][0], "without the invocation it is the base that answers"
        finally:
            await client.close()
            await node.stop()

    asyncio.run(asyncio.wait_for(session(), 120.0))
