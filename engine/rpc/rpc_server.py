"""Serve an EngineClient over gRPC, with the names and numbers of vLLM's services.

It knows no rule of its own: what HTTP refuses is refused here, by the same functions.
"""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.api.adapters import AdapterAdmin
from engine.api.base import EngineClient
from engine.api.errors import ApiError, refused
from engine.api.keys import Permission
from engine.api.schema import LoadAdapter
from engine.api.server.listener import most_connections
from engine.config.config import ServeConfig
from engine.errors import InvalidConfig, UnknownModel
from engine.metrics.request_log import RequestRecord
from engine.output import Delta, join_deltas
from engine.rpc import translation
from engine.rpc.bounded_server import BoundedServer, RpcBounds, RpcService
from engine.rpc.rpc_generation import RpcGeneration
from engine.rpc.rpc_guard import RpcGuard
from engine.rpc.wire import control_pb2, inference_pb2
from engine.waiting.task_pool import TaskPool

INFERENCE, CONTROL = "vllm.Inference", "vllm.Control"
_grpc, _health_rpc, _health = cast(Any, grpc), cast(Any, health_pb2_grpc), cast(Any, health)
_TEXT_THREADS = 2
_OTHER_CALLS = 64  # beside the requests that may wait
_CLOSE_S = 5.0


class RpcServer:
    """The services on a socket. A call whose client leaves, or whose deadline passes, frees what it held."""

    def __init__(
        self, client: EngineClient, admin: AdapterAdmin, guard: RpcGuard, config: ServeConfig
    ) -> None:
        """Listen nowhere yet."""
        self._client, self._admin, self._guard, self._config = client, admin, guard, config
        self._texts = TaskPool("gRPC text", _TEXT_THREADS)
        self._health = _health.aio.HealthServicer()
        self._server: BoundedServer | None = None

    async def listen(self, host: str, port: int) -> str:
        """Listen at a host and port (0 for any that is free) and return the address. Raises InvalidConfig."""
        http = self._config.http
        most = most_connections(http.max_connections)
        bounds = RpcBounds(most, http.header_timeout_s, http.idle_timeout_s, http.max_body_bytes)
        bounded = self._server = BoundedServer(bounds, most_calls=self._config.max_waiting + _OTHER_CALLS)
        server = bounded.server
        bounded.add(self._inference())
        bounded.add(self._control())
        _health_rpc.add_HealthServicer_to_server(self._health, server)
        names = (INFERENCE, CONTROL, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
        cast(Any, reflection).enable_server_reflection(names, server)
        address = f"[{host}]" if ":" in host else host
        try:
            bound = self._bind(server, f"{address}:{port}")
        except RuntimeError as error:
            reason = f"{host} cannot be bound to it: choose another port or --host"
            raise InvalidConfig("grpc_port", port, reason) from error
        await bounded.start()
        for name in ("", INFERENCE, CONTROL):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return f"grpc://{address}:{bound}"

    async def stop_serving(self) -> None:
        """Tell whoever asks for health that nothing new is taken."""
        await self._health.enter_graceful_shutdown()

    async def close(self) -> None:
        """End every call, after a while for clients to take the rest of their answers."""
        if self._server is not None:
            await self._server.stop(_CLOSE_S)
        self._texts.close()

    def _bind(self, server: grpc.aio.Server, address: str) -> int:
        access = self._config.access
        if access.tls_cert is None or access.tls_key is None:
            return server.add_insecure_port(address)
        pair = (Path(access.tls_key).read_bytes(), Path(access.tls_cert).read_bytes())
        return server.add_secure_port(address, _grpc.ssl_server_credentials([pair]))

    def _inference(self) -> RpcService:
        request, response = inference_pb2.GenerateRequest, inference_pb2.GenerateResponse
        one = self._guard.unary(f"/{INFERENCE}/Generate", Permission.ASK, self._generate)
        many = self._guard.stream(f"/{INFERENCE}/GenerateStream", Permission.ASK, self._generate_stream)
        codec = {
            "request_deserializer": request.FromString,
            "response_serializer": response.SerializeToString,
        }
        methods = {
            "Generate": _grpc.unary_unary_rpc_method_handler(one, **codec),
            "GenerateStream": _grpc.unary_stream_rpc_method_handler(many, **codec),
        }
        return RpcService(INFERENCE, methods)

    def _control(self) -> RpcService:
        wire = control_pb2
        calls = (
            ("GetModelInfo", Permission.ASK, self._model_info, wire.GetModelInfoRequest, wire.ModelInfo),
            ("ListLoras", Permission.ASK, self._list, wire.ListLorasRequest, wire.ListLorasResponse),
            ("LoadLora", Permission.ADMINISTER, self._load, wire.LoadLoraRequest, wire.LoadLoraResponse),
            (
                "UnloadLora", Permission.ADMINISTER, self._unload,
                wire.UnloadLoraRequest, wire.UnloadLoraResponse,
            ),
        )  # fmt: skip
        methods = {
            name: _grpc.unary_unary_rpc_method_handler(
                self._guard.unary(f"/{CONTROL}/{name}", needed, answer),
                request_deserializer=request.FromString,
                response_serializer=response.SerializeToString,
            )
            for name, needed, answer, request, response in calls
        }
        return RpcService(CONTROL, methods)

    async def _generate(
        self, wire: inference_pb2.GenerateRequest, record: RequestRecord
    ) -> inference_pb2.GenerateResponse:
        if wire.sampling.num_sequences > 1:
            message = f"{wire.sampling.num_sequences} need GenerateStream: call that, or give 1"
            raise refused("num_sequences", message, "invalid_value")
        async with await self._submitted(wire, record) as generation:
            deltas: list[Delta] = [delta async for delta in generation.deltas()]
            prompt = generation.prompt
        joined = join_deltas(deltas)
        return inference_pb2.GenerateResponse(
            prompt_info=translation.prompt_info(wire, prompt, joined),
            outputs=translation.sequence_output(wire, joined, len(joined.token_ids)),
        )

    async def _generate_stream(
        self, wire: inference_pb2.GenerateRequest, record: RequestRecord
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        async with await self._submitted(wire, record) as generation:
            counts: dict[int, int] = {}
            async for delta in generation.deltas():
                info = None if counts else translation.prompt_info(wire, generation.prompt, delta)
                counts[delta.index] = counts.get(delta.index, 0) + len(delta.token_ids)
                output = translation.sequence_output(wire, delta, counts[delta.index])
                yield inference_pb2.GenerateResponse(prompt_info=info, outputs=output)

    async def _submitted(self, wire: inference_pb2.GenerateRequest, record: RequestRecord) -> RpcGeneration:
        request = await self._texts.run(lambda: translation.read_generate(wire, self._client))
        record.model = request.model
        generation = RpcGeneration(self._client, request, f"rpc-{uuid.uuid4().hex}")
        record.counts = generation
        return generation

    async def _model_info(
        self, wire: control_pb2.GetModelInfoRequest, record: RequestRecord
    ) -> control_pb2.ModelInfo:
        first, *others = self._client.model_names
        return control_pb2.ModelInfo(
            model_id=first, served_model_name=first, served_model_aliases=others,
            supports_text_input=True, supports_token_ids_input=True, supports_lora=True,
        )  # fmt: skip

    def _listed(self) -> dict[str, control_pb2.LoraAdapter]:
        models = (model for model in self._admin.models() if model["parent"] is not None)
        named = {str(model["id"]): str(model["root"]) for model in models}
        return {name: translation.lora_adapter(name, root) for name, root in named.items()}

    async def _list(
        self, wire: control_pb2.ListLorasRequest, record: RequestRecord
    ) -> control_pb2.ListLorasResponse:
        return control_pb2.ListLorasResponse(adapters=self._listed().values())

    async def _load(
        self, wire: control_pb2.LoadLoraRequest, record: RequestRecord
    ) -> control_pb2.LoadLoraResponse:
        record.model = wire.lora_name
        body = LoadAdapter(lora_name=wire.lora_name, lora_path=wire.source_path, load_inplace=False)
        try:
            model = await self._admin.load(body)
        except ApiError as error:
            if error.param != "lora_path":
                raise
            message = error.message.removeprefix("lora_path")
            raise ApiError(error.status, f"source_path{message}", "source_path", error.code) from error
        adapter = translation.lora_adapter(wire.lora_name, str(model["root"]))
        return control_pb2.LoadLoraResponse(adapter=adapter)

    async def _unload(
        self, wire: control_pb2.UnloadLoraRequest, record: RequestRecord
    ) -> control_pb2.UnloadLoraResponse:
        record.model = wire.lora_name
        if (adapter := self._listed().get(wire.lora_name)) is None:
            raise UnknownModel(wire.lora_name)
        await self._client.unload_adapter(wire.lora_name)
        return control_pb2.UnloadLoraResponse(adapter=adapter)
