"""Serve vllm.Control: what the server is, its adapters by vLLM's names, and the end of calls and of itself."""

import uuid
from collections.abc import Callable

from engine.api.adapters import AdapterAdmin
from engine.api.base import EngineClient
from engine.api.errors import refused
from engine.api.keys import Permission
from engine.api.openapi.document import software_version
from engine.api.schema import LoadAdapter
from engine.config.config import ServeConfig
from engine.errors import AdapterExists, UnknownModel
from engine.rpc import translation
from engine.rpc.live_calls import LiveCalls
from engine.rpc.rpc_guard import RpcCall, RpcMethod, one_answer
from engine.rpc.wire import control_pb2 as wire

CONTROL = "vllm.Control"
_API_VERSION = "vllm"


class ControlService:
    """Answers for one server. `stop` begins to shut it down."""

    def __init__(
        self,
        client: EngineClient,
        admin: AdapterAdmin,
        config: ServeConfig,
        live: LiveCalls,
        stop: Callable[[], None],
    ) -> None:
        self._client, self._admin, self._config, self._live, self._stop = client, admin, config, live, stop
        self._instance_id = uuid.uuid4().hex

    def methods(self) -> tuple[RpcMethod, ...]:
        """List the calls."""
        ask, administer = Permission.ASK, Permission.ADMINISTER
        return (
            one_answer("GetServerInfo", ask, wire.GetServerInfoRequest, self._server_info),
            one_answer("GetModelInfo", ask, wire.GetModelInfoRequest, self._model_info),
            one_answer("Shutdown", administer, wire.ShutdownRequest, self._shutdown),
            one_answer("Abort", ask, wire.AbortRequest, self._abort),
            one_answer("ListLoras", ask, wire.ListLorasRequest, self._list),
            one_answer("LoadLora", administer, wire.LoadLoraRequest, self._load),
            one_answer("UnloadLora", administer, wire.UnloadLoraRequest, self._unload),
            one_answer("GetKvEventSources", ask, wire.GetKvEventSourcesRequest, self._kv_event_sources),
        )

    async def _server_info(self, message: wire.GetServerInfoRequest, call: RpcCall) -> wire.ServerInfo:
        info = wire.ServerInfo(
            engine_version=software_version(), api_version=_API_VERSION, instance_id=self._instance_id,
            max_model_len=self._client.max_model_len, rl_capabilities=wire.RlCapabilities(),
            max_loras=self._config.max_waiting,  # each request that waits may have another
        )  # fmt: skip
        engine, blocks = self._config.engine, self._client.stats().blocks
        devices = 1
        if self._config.cluster.role != "router":
            devices = engine.tensor_parallel_size
            info.kv_block_size = engine.block_size
            info.total_kv_blocks = blocks.used + blocks.cached + blocks.free
            info.max_running_requests = min(engine.max_num_seqs, engine.max_num_batched_tokens)
            info.max_batched_tokens = engine.max_num_batched_tokens
            info.max_loras = info.max_running_requests  # each sequence of a step may have another
        info.parallelism.CopyFrom(
            wire.ParallelismInfo(
                tensor_parallel_size=devices, pipeline_parallel_size=1, data_parallel_size=1,
                decode_context_parallel_size=1, world_size=devices, data_parallel_size_local=1,
            )
        )  # fmt: skip
        return info

    async def _model_info(self, message: wire.GetModelInfoRequest, call: RpcCall) -> wire.ModelInfo:
        first, *others = self._client.model_names
        return wire.ModelInfo(
            model_id=first, served_model_name=first, served_model_aliases=others,
            supports_text_input=True, supports_token_ids_input=True, supports_lora=True,
        )  # fmt: skip

    async def _shutdown(self, message: wire.ShutdownRequest, call: RpcCall) -> wire.ShutdownResponse:
        self._stop()
        return wire.ShutdownResponse()

    async def _abort(self, message: wire.AbortRequest, call: RpcCall) -> wire.AbortResponse:
        await self._live.abort(call.record.key, message.request_ids)
        return wire.AbortResponse()

    async def _list(self, message: wire.ListLorasRequest, call: RpcCall) -> wire.ListLorasResponse:
        return wire.ListLorasResponse(adapters=self._listed(call.record.tenant).values())

    async def _load(self, message: wire.LoadLoraRequest, call: RpcCall) -> wire.LoadLoraResponse:
        name = call.record.model = message.lora_name
        try:
            model = await self._admin.load(
                LoadAdapter(lora_name=name, lora_path=message.source_path, load_inplace=False)
            )
        except AdapterExists:
            raise refused(
                "lora_name", f"{name!r} is loaded already: unload it first", "adapter_exists"
            ) from None
        return wire.LoadLoraResponse(adapter=translation.lora_adapter(name, str(model["root"])))

    async def _unload(self, message: wire.UnloadLoraRequest, call: RpcCall) -> wire.UnloadLoraResponse:
        name = call.record.model = message.lora_name
        if (adapter := self._listed().get(name)) is None:
            raise UnknownModel(name)
        await self._client.unload_adapter(name)
        return wire.UnloadLoraResponse(adapter=adapter)

    async def _kv_event_sources(
        self, message: wire.GetKvEventSourcesRequest, call: RpcCall
    ) -> wire.GetKvEventSourcesResponse:
        return wire.GetKvEventSourcesResponse()  # none: who cannot ask does not begin

    def _listed(self, tenant: str = "") -> dict[str, wire.LoraAdapter]:
        models = (model for model in self._admin.models(tenant) if model["parent"] is not None)
        named = {str(model["id"]): str(model["root"]) for model in models}
        return {name: translation.lora_adapter(name, root) for name, root in named.items()}
