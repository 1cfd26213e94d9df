"""A router over live nodes: answers are those of one engine, and outlive the node that began them."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from engine.catalogue.alias_targets import AliasTarget, chosen_target
from engine.cluster.router.cluster_client import ClusterClient
from engine.errors import NotInTime, RateLimited, UnknownModel
from engine.output import Delta, RequestOutput, join_deltas
from engine.tenants.tenant import Tenant, TenantLimits
from scheduler.limits import RequestRefused
from scheduler.plan import FinishReason
from scheduler.request import Origin, SamplingParams
from scheduler.structured_outputs import StructuredOutputsParams
from tests.engine.api.session import session
from tests.engine.cluster.live_nodes import TASKS, TIMEOUT_S, LiveNode, with_router

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    by: dict[int, list[Delta]] = {}
    for delta in deltas:
        by.setdefault(delta.index, []).append(delta)
    return [join_deltas(by[index]) for index in sorted(by)]


async def _whole(output: RequestOutput) -> list[Delta]:
    """Collect an output, each of its sequences joined; aborted if nobody waits any more."""
    try:
        return _joined([delta async for delta in output])
    finally:
        await output.aclose()


def _alike(found: Sequence[Delta], expected: Sequence[Delta]) -> bool:
    """Compare answers; log-probabilities of tokens that were computed anew may differ by rounding."""
    bare = [replace(delta, logprobs=(), prompt_logprobs=()) for delta in found]
    assert bare == [replace(delta, logprobs=(), prompt_logprobs=()) for delta in expected]
    for mine, other in zip(found, expected, strict=True):
        for which in ("logprobs", "prompt_logprobs"):
            one, two = getattr(mine, which), getattr(other, which)
            assert [each.token_id for each in one] == [each.token_id for each in two]
            assert [each.logprob for each in one] == pytest.approx([each.logprob for each in two], abs=1e-3)
    return True


async def _ask(client: ClusterClient | LiveNode, name: str, text: str, params: SamplingParams) -> list[Delta]:
    front = client.front if isinstance(client, LiveNode) else client
    ids = tuple(front.tokenizer.encode(text))
    return await _whole(await front.submit(name, ids, params, f"{name}-{text}-{id(params)}"))


WAYS = {  # parameters under each of which an answer must be the same wherever it is computed
    "greedy": SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
    "seeded": SamplingParams(temperature=1.5, seed=7, max_tokens=60, ignore_eos=True),
    "penalised": SamplingParams(seed=3, presence_penalty=1.5, max_tokens=60, ignore_eos=True),
    "n=3": SamplingParams(temperature=1.5, seed=5, n=3, max_tokens=60, ignore_eos=True),
    "logprobs": SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, max_tokens=60, ignore_eos=True),
    "form": SamplingParams(
        temperature=1.5,
        seed=13,
        max_tokens=60,
        structured_outputs=StructuredOutputsParams(regex="(ab|cd|e){8,12}"),
    ),
    "stop": SamplingParams(temperature=1.5, seed=11, stop=("q", "zz"), max_tokens=60, ignore_eos=True),
}


@pytest.mark.slow
def test_answers_through_a_router_are_those_of_one_engine() -> None:
    """Every way of drawing, of one adapter; every adapter, by one way."""

    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        asked = [("sort", way) for way in WAYS] + [(name, "greedy") for name in ("demo", "reverse", "rot13")]
        for name, way in asked:
            params = replace(WAYS[way], max_tokens=20)
            expected = await _ask(nodes[0], name, "garden", params)
            assert _alike(await _ask(client, name, "garden", params), expected)
        assert sum(node.watcher.tokens.get("reverse", 0) for node in nodes) > 0

    with_router(visit)


@pytest.mark.parametrize(
    ("way", "after"),
    [("greedy", 1), ("greedy", 5), ("seeded", 5), ("penalised", 5), ("n=3", 1), ("n=3", 5), ("logprobs", 1),
     ("logprobs", 5), ("stop", 2), ("form", 5)],
)  # fmt: skip
def test_a_node_that_dies_takes_no_stream_with_it(way: str, after: int) -> None:
    """After the first token all is as begun anew; what a way of drawing has to carry over shows after more."""
    params = WAYS[way]

    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        expected = await _ask(nodes[0], "sort", "garden", params)
        output = await client.submit("sort", tuple(client.tokenizer.encode("garden")), params, "moves")
        begun = [await anext(output) for _ in range(after)]
        victim = max(nodes, key=lambda node: node.engine.core.num_live_requests)
        await victim.link.close()
        rest = [delta async for delta in output]
        assert _alike(_joined(begun + rest), expected)
        assert client.forwarding.counts.moved == 1
        assert b"loraserve_requests_moved_total 1.0" in client.telemetry.render(
            client.stats(), client.series()
        )

    with_router(visit)


def test_a_node_that_drains_takes_nothing_new_and_ends_what_it_has() -> None:
    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        ids = tuple(client.tokenizer.encode("garden"))
        output = await client.submit("sort", ids, params, "runs")
        await anext(output)
        busy, other = sorted(nodes, key=lambda node: -node.engine.core.num_live_requests)
        busy.link.drain()
        before = busy.watcher.tokens["sort"]
        answers = [_ask(client, name, "garden", GREEDY) for name in TASKS]
        await asyncio.gather(*answers, *[_ask(client, "demo", text, GREEDY) for text in ("a", "b", "c")])
        assert other.watcher.tokens.keys() >= {*TASKS, ""}
        assert [delta async for delta in output][-1].finish_reason is not None
        assert busy.watcher.tokens["sort"] - before <= 60
        assert client.forwarding.counts.moved == 0

    with_router(visit)


@pytest.mark.parametrize("after", [0, 5])
def test_what_a_drain_does_not_wait_for_goes_on_elsewhere_and_is_counted(after: int) -> None:
    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        params, counts = WAYS["greedy"], client.forwarding.counts
        expected = await _ask(nodes[0], "sort", "garden", params)
        output = await client.submit("sort", tuple(client.tokenizer.encode("garden")), params, "moves")
        begun = [await anext(output) for _ in range(after)]
        (at,) = counts.sent_to
        leaving, other = sorted(nodes, key=lambda node: node.name != at)
        leaving.link.drain()
        await leaving.link.drained(0.0)
        await leaving.link.close()
        rest = [delta async for delta in output]
        assert _alike(_joined(begun + rest), expected)
        assert counts.sent_to == {leaving.name: 1, other.name: 1}
        assert (counts.moved, counts.streams_moved) == (1, 1)

    with_router(visit)


def test_what_no_node_can_take_is_refused_and_nothing_is_left() -> None:
    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        for node in nodes:
            node.link.drain()
        await asyncio.sleep(0.3)
        client.forwarding.router._options = replace(  # pyright: ignore[reportPrivateUsage]
            client.forwarding.router._options,  # pyright: ignore[reportPrivateUsage]
            patience_s=0.2,
        )
        with pytest.raises(UnknownModel):
            await _ask(client, "nobody", "garden", GREEDY)
        with pytest.raises(RequestRefused, match="context length"):
            await _ask(client, "demo", "garden", SamplingParams(max_tokens=100_000))
        task = asyncio.create_task(_ask(client, "demo", "garden", GREEDY))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        (output,) = await client.submit_all("demo", {"left": (1, 2, 3)}, GREEDY)
        await output.aclose()

    with_router(visit)


def test_a_router_says_why_it_can_serve_nothing_and_takes_no_name_for_unknown_then() -> None:
    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        async def refusals(trouble: str) -> None:
            assert client.stats().trouble == trouble
            assert client.may_serve("nobody")
            with pytest.raises(NotInTime, match=trouble):
                await _ask(client, "nobody", "garden", GREEDY)

        assert client.stats().trouble is None
        assert not client.may_serve("nobody")
        with pytest.raises(UnknownModel):
            await _ask(client, "nobody", "garden", GREEDY)
        client.view.known = False
        await refusals("this router has not heard from the coordinator yet")
        client.view.known = True
        await nodes[0].link.close()
        async with asyncio.timeout(TIMEOUT_S):
            while client.forwarding.ready:
                await asyncio.sleep(0.01)
        await refusals("none of 1 nodes can be reached")
        client.view.members = {}
        await refusals("this cluster has no node")
        await client.drain(0.0)
        assert "shutting down" in str(client.stats().trouble)

    with_router(visit, nodes=1)


def test_a_router_holds_tenants_to_what_they_may() -> None:
    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        client.accounts.adopt(
            [Tenant("a", weight=2.0, adapters=("sort",), limits=TenantLimits(requests_per_minute=1))]
        )
        assert client.forwarding.router._queue._weights == {"a": 2.0}
        ids, origin = tuple(client.tokenizer.encode("garden")), Origin("a")
        with pytest.raises(UnknownModel):
            await client.submit_all("reverse", {"1": ids}, GREEDY, origin)
        await _whole((await client.submit_all("sort", {"2": ids}, GREEDY, origin))[0])
        with pytest.raises(RateLimited):
            await client.submit_all("sort", {"3": ids}, GREEDY, origin)
        await _whole((await client.submit_all("reverse", {"4": ids}, GREEDY, Origin("b")))[0])

    with_router(visit)


def test_token_ids_and_holds_and_aborts_go_through_a_router() -> None:
    sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 1}

    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        prompt = list(client.tokenizer.encode("garden"))
        body = {"model": "sort", "token_ids": prompt, "sampling_params": sampling}
        async with session(client) as api, session(nodes[0].front) as alone:
            path = "/inference/v1/generate"
            (through,), (direct,) = [(await each.post(path, body)).json["choices"] for each in (api, alone)]
            assert (through["token_ids"], through["finish_reason"]) == (direct["token_ids"], "length")
            salted = body | {"token_ids": prompt * 6}
            told = [await api.post(path, salted | {"cache_salt": salt}) for salt in ("a", "a", "a", "b")]
            cached = [each.json["usage"]["prompt_tokens_details"]["cached_tokens"] for each in told]
            assert (cached[0], cached[3]) == (0, 0)
            assert max(cached[1:3]) > 0  # of three requests two meet on one of two nodes
            long = replace(GREEDY, max_tokens=100, ignore_eos=True)
            others = asyncio.create_task(_ask(client, "rot13", "garden", long))
            streams = await client.submit_all(
                "sort", {"x": tuple(prompt), "y": tuple(prompt)}, replace(long, n=2)
            )
            begun = [await anext(stream) for stream in streams]
            assert (await api.post("/v1/adapters/hold", {"name": "sort", "seconds": 60})).status == 200
            assert (await api.post("/v1/adapters/abort", {"name": "sort"})).json["aborted"] == 2
            for first, stream in zip(begun, streams, strict=True):
                joined = _joined([first, *[delta async for delta in stream]])
                assert [delta.finish_reason for delta in joined] == [FinishReason.ABORT] * 2
            assert (await api.post(path, body)).error["code"] == "adapter_held"
            assert [len(delta.token_ids) for delta in await others] == [100]
            assert (await api.post("/v1/adapters/release", {"name": "sort"})).status == 200
            assert (await api.post(path, body)).json["choices"][0]["token_ids"] == direct["token_ids"]

    with_router(visit)


def test_an_alias_with_shares_is_answered_by_the_target_of_each_request() -> None:
    halves = (AliasTarget("sort", 0.5), AliasTarget("reverse", 0.5))

    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        known = client.view.catalogue
        alias = replace(known["sort"], name="best", alias_of="sort", targets=halves)
        client.view.catalogue = {**known, "best": alias}
        ids, found = tuple(client.tokenizer.encode("garden")), set[str]()
        for number in range(8):
            target = chosen_target("best", halves, str(number))
            output = await client.submit("best", ids, GREEDY, str(number))
            assert output.adapter_digest == known[target].ref.digest
            assert _alike(await _whole(output), await _ask(nodes[0], target, "garden", GREEDY))
            found.add(target)
        assert found == {"sort", "reverse"} <= set(client.telemetry.recent())
        assert "best" not in client.telemetry.recent()

    with_router(visit)
