"""Serve vllm.Inference: text, whole or in parts."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from engine.api.base import EngineClient
from engine.api.bodies.tenant_models import TenantModels
from engine.api.errors import refused
from engine.api.keys import Permission
from engine.api.schema import is_request_id
from engine.output import Delta, join_deltas
from engine.rpc import translation
from engine.rpc.live_calls import LiveCalls
from engine.rpc.rpc_generation import RpcGeneration
from engine.rpc.rpc_guard import RpcCall, RpcMethod, one_answer
from engine.rpc.wire import inference_pb2
from engine.waiting.task_pool import TaskPool
from scheduler.request import Origin

INFERENCE = "vllm.Inference"
_RANK = "x-data-parallel-rank"
_ID_RULE = "give at most 128 letters, digits or any of ._:/+=@-"


class InferenceService:
    """Answers requests of one prompt. A client that leaves, or whose deadline passes, frees what it held."""

    def __init__(self, client: EngineClient, live: LiveCalls, texts: TaskPool) -> None:
        """Read requests in `texts`, and let `live` know them while they last."""
        self._client, self._live, self._texts = client, live, texts

    def methods(self) -> tuple[RpcMethod, ...]:
        """List the calls."""
        asks = inference_pb2.GenerateRequest
        return (
            one_answer("Generate", Permission.ASK, asks, self._generate),
            RpcMethod("GenerateStream", Permission.ASK, asks, self._generate_stream),
        )

    async def _generate(
        self, wire: inference_pb2.GenerateRequest, call: RpcCall
    ) -> inference_pb2.GenerateResponse:
        found: dict[int, list[Delta]] = {}
        async with self._submitted(wire, call) as generation:
            async for delta in generation.deltas():
                found.setdefault(delta.index, []).append(delta)
        joined = [join_deltas(found[index]) for index in sorted(found)]
        outputs = [translation.sequence_output(wire, each, len(each.token_ids)) for each in joined]
        return inference_pb2.GenerateResponse(
            prompt_info=translation.prompt_info(wire, generation.prompt, joined[0]),
            outputs=outputs[0],
            further_outputs=outputs[1:],
            system_fingerprint=generation.version,
        )

    async def _generate_stream(
        self, wire: inference_pb2.GenerateRequest, call: RpcCall
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        async with self._submitted(wire, call) as generation:
            counts: dict[int, int] = {}
            async for delta in generation.deltas():
                is_first = not counts
                info = translation.prompt_info(wire, generation.prompt, delta) if is_first else None
                counts[delta.index] = counts.get(delta.index, 0) + len(delta.token_ids)
                output = translation.sequence_output(wire, delta, counts[delta.index])
                version = generation.version if is_first else None
                yield inference_pb2.GenerateResponse(
                    prompt_info=info, outputs=output, system_fingerprint=version
                )

    @asynccontextmanager
    async def _submitted(
        self, wire: inference_pb2.GenerateRequest, call: RpcCall
    ) -> AsyncGenerator[RpcGeneration, None]:
        """Run a request; the client is told its id first, so that it can abort what has no token yet."""
        record = call.record
        _check_rank(call)
        if wire.request_id:
            if not is_request_id(wire.request_id):
                raise refused("request_id", _ID_RULE, "invalid_value")
            record.request_id = wire.request_id
        generation = RpcGeneration(self._client, f"rpc-{uuid.uuid4().hex}")
        with self._live.hold(record.key, record.request_id, generation, bool(wire.request_id)):
            await call.begin()
            models = TenantModels(self._client, record.tenant)
            request = await self._texts.run(lambda: translation.read_generate(wire, models))
            record.model, record.counts = request.model, generation
            record.rates = partial(self._client.accounts.headers, record.tenant, request.model)
            async with generation:
                origin = Origin(record.tenant, request.priority, record.trace, request.cache_salt)
                await generation.submit(request, origin)
                yield generation


def _check_rank(call: RpcCall) -> None:
    """Refuse a call for another data-parallel rank than this server's only one."""
    rank = call.metadata.get(_RANK, "0").strip()
    if set(rank) != {"0"}:
        raise refused(_RANK, "this server is rank 0 of 1: give 0, or leave it out", "invalid_value")
