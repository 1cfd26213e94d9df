"""gRPC before a router: what a request asks for beside its answer reaches the node, as by HTTP."""

import pytest

from engine.cluster.router.cluster_client import ClusterClient
from engine.config.config import ServeConfig
from tests.engine.api.session import session
from tests.engine.cluster.live_nodes import LiveNode, with_router
from tests.engine.rpc.door import Ask, RpcDoor, served


def test_salts_scores_and_the_answering_version_are_those_of_http() -> None:
    body = {"model": "sort", "temperature": 0, "max_tokens": 4, "ignore_eos": True, "logprobs": 0}

    async def visit(client: ClusterClient, nodes: list[LiveNode]) -> None:
        prompt = list(client.tokenizer.encode("garden")) * 6
        (node,) = nodes
        ask = Ask(token_ids={"ids": prompt}, lora_name="sort", priority=5, kv={"cache_salt": "a"})
        ask.stopping.max_new_tokens, ask.stopping.ignore_eos = 4, True
        ask.response.output_logprobs = True
        async with session(client) as api, served(client, ServeConfig()) as found:
            door, more = RpcDoor(*found), {"cache_salt": "a", "priority": 5}
            http = (await api.post("/v1/completions", body | {"prompt": prompt} | more)).json
            raw = await door.generate(ask)
            reused = node.front.stats().blocks.hit_tokens
            ask.kv.cache_salt, ask.response.logprobs_mode = "b", "processed_logprobs"
            ask.temperature, ask.sampling.top_k = 1, 1
            drawn = [part async for part in door.stream(ask)]
            assert reused == node.front.stats().blocks.hit_tokens > 0
            (choice,) = http["choices"]
            assert list(raw.outputs.logprobs) == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-3)
            assert [each.outputs.logprobs[0] for each in drawn] == [0] * 4  # there was nothing else to draw
            assert raw.system_fingerprint == drawn[0].system_fingerprint == http["system_fingerprint"]
            assert not any(part.HasField("system_fingerprint") for part in drawn[1:])

    with_router(visit, nodes=1)
