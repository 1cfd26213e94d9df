"""Hold what an operator may choose, as frozen values: every field with its flag, its help and its type.

A value is checked when a configuration is made, whoever makes it: the command line, a file, the environment or Python.
What only the model, the device or the network can tell is checked where these are known.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.config.access_config import AccessConfig, key_name
from engine.config.batches_config import BatchesConfig
from engine.config.cluster_config import ClusterConfig
from engine.config.http_config import HttpConfig
from engine.config.launch_config import LaunchConfig
from engine.config.option import Option, check_fields
from engine.config.option_types import (
    CHAT_TEMPLATE,
    COUNT,
    DIRECTORY,
    ENDPOINT,
    FILE,
    FLAG,
    FOLDER,
    LENGTH,
    LORA,
    MODEL,
    PORT,
    SECONDS,
    SIZE,
    TEXT,
    one_of,
)
from engine.config.peer_config import PeerConfig
from engine.config.source_config import SourceConfig
from engine.config.tenants_config import TenantsConfig
from engine.errors import InvalidConfig
from model.config import AttentionChoice, DtypeChoice, LinearChoice, Quantization
from scheduler.limits import DEFAULTS
from scheduler.request import LogprobsMode

Device = Literal["auto", "cpu", "cuda"]
LoraDtype = Literal["auto", "float32", "bfloat16", "fp8"]
UnifiedMemory = Literal["auto", "on", "off"]
AccessLog = Literal["off", "text", "json"]
LogLevel = Literal["debug", "info", "warning"]
ToolParser = Literal["auto", "none", "hermes", "llama3_json", "mistral"]

_NO_PEERS = PeerConfig()
_NO_SOURCES = SourceConfig()
_OPEN = AccessConfig()
_BOUNDED = HttpConfig()
_SINGLE = ClusterConfig()
_NO_BATCHES = BatchesConfig()
_LOCAL = LaunchConfig()
_NO_TENANTS = TenantsConfig()


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: a base model, its adapters, and how much of the machine it may use.

    `loras` maps names to PEFT folders or URLs that are loaded at start. Every PEFT folder below `lora_dir` is known by
    its folder's name and loaded when first asked for. Sizes left None are derived at start from model and machine.
    """

    model: Annotated[
        str | Path | None,
        Option("model", MODEL, "folder or hub id of the base model; none: the embedded demo"),
    ] = None
    loras: Annotated[
        Mapping[str, str | Path] | None,
        Option("adapters", LORA, "load this PEFT folder or URL at start", "lora", many=True),
    ] = None
    dtype: Annotated[
        DtypeChoice,
        Option(
            "model",
            one_of(DtypeChoice, "TYPE"),
            "what the model computes in",
            note="auto is the checkpoint's, but float32 for float16 on a CPU",
        ),
    ] = "auto"
    _: KW_ONLY
    served_model_name: Annotated[
        str | tuple[str, ...] | None,
        Option("model", TEXT, "what requests call the base model", many=True,
               note="by default the last part of its folder, or its hub id"),
    ] = None  # fmt: skip
    device: Annotated[Device, Option("model", one_of(Device, "DEVICE"), "where the model computes")] = "auto"
    tensor_parallel_size: Annotated[
        int, Option("model", COUNT, "devices that compute each layer together")
    ] = 1
    quantization: Annotated[
        Quantization,
        Option(
            "model",
            one_of(Quantization, "METHOD"),
            "how the layers' base matrices are kept",
            note="int8 is for a CPU, fp8 for a CUDA device",
        ),
    ] = "none"
    attention_backend: Annotated[
        AttentionChoice,
        Option(
            "model",
            one_of(AttentionChoice, "NAME"),
            "what computes attention",
            note="auto is on a CPU native where compiled, else torch; on a GPU flashinfer or triton",
        ),
    ] = "auto"
    linear_backend: Annotated[
        LinearChoice,
        Option("model", one_of(LinearChoice, "NAME"), "what multiplies by the base's matrices on a CPU",
               note="auto tries both at the start in bfloat16, and takes the faster one"),
    ] = "auto"  # fmt: skip
    cuda_graphs: Annotated[
        bool, Option("model", FLAG, "capture decode steps on a CUDA device as graphs, and replay them")
    ] = True
    max_model_len: Annotated[
        int | None, Option("model", LENGTH, "most tokens of a prompt and its answer together")
    ] = None
    chat_template: Annotated[
        str | Path | None,
        Option("model", CHAT_TEMPLATE, "Jinja file, or its text, to use in place of the model's chat template"),
    ] = None  # fmt: skip
    tool_call_parser: Annotated[
        ToolParser,
        Option(
            "model",
            one_of(ToolParser, "NAME"),
            "how the model writes calls of tools; auto tells it by the chat template",
        ),
    ] = "auto"
    logprobs_mode: Annotated[
        LogprobsMode,
        Option("model", one_of(LogprobsMode, "MODE"), "which log-probabilities are told, unless asked"),
    ] = "raw_logprobs"
    progress: Annotated[bool, Option("model", FLAG, "show progress while the model is read")] = True
    self_test: Annotated[
        bool,
        Option("model", FLAG, "compute a short prompt with the base at start, and with an adapter before it serves"),
    ] = True  # fmt: skip
    lora_dir: Annotated[
        Path | None,
        Option("adapters", FOLDER, "every PEFT folder below is known by its name", note="hidden ones apart"),
    ] = None
    lora_dir_poll_s: Annotated[
        float,
        Option("adapters", SECONDS, "how often that folder is looked at for changes", note="0: at start only"),
    ] = 2.0  # fmt: skip
    lora_dtype: Annotated[
        LoraDtype,
        Option(
            "adapters",
            one_of(LoraDtype, "TYPE"),
            "what adapters are kept in",
            note="auto is the model's, but float32 on a CPU without compiled code",
        ),
    ] = "auto"
    adapter_bytes: Annotated[
        int | None, Option("adapters", SIZE, "memory for resident adapters, on each device")
    ] = None
    unified_memory: Annotated[
        UnifiedMemory,
        Option(
            "adapters",
            one_of(UnifiedMemory, "WHEN"),
            "whether K/V and adapters share one pool of memory",
            note="auto does so on a CUDA device",
            former="shared-memory",
        ),
    ] = "auto"
    adapter_cache_dir: Annotated[
        Path | None, Option("adapters", DIRECTORY, "keep packed adapters on disk here")
    ] = None
    adapter_cache_bytes: Annotated[
        int | None, Option("adapters", SIZE, "most bytes of packed adapters there; none: no bound")
    ] = None
    adapter_patience_s: Annotated[
        float, Option("adapters", SECONDS, "how long a request may be passed over for others")
    ] = DEFAULTS.adapter_patience_s
    adapter_read_timeout_s: Annotated[
        float, Option("adapters", SECONDS, "how long an adapter's files are waited for")
    ] = 60.0
    max_num_seqs: Annotated[int, Option("scheduling", COUNT, "sequences that run at once")] = (
        DEFAULTS.max_num_seqs
    )
    max_num_batched_tokens: Annotated[int, Option("scheduling", COUNT, "tokens per step")] = (
        DEFAULTS.max_num_batched_tokens
    )
    kv_cache_bytes: Annotated[
        int | None, Option("scheduling", SIZE, "memory for K/V, on each device (2GiB, 512MiB, ...)")
    ] = None
    block_size: Annotated[int, Option("scheduling", COUNT, "tokens per block of K/V")] = DEFAULTS.block_size
    peers: PeerConfig = _NO_PEERS
    sources: SourceConfig = _NO_SOURCES

    def __post_init__(self) -> None:
        check_fields(self)
        if self.adapter_cache_bytes is not None and self.adapter_cache_dir is None:
            remedy = "it does nothing without --adapter-cache-dir: give that too, or leave it out"
            raise InvalidConfig("adapter_cache_bytes", self.adapter_cache_bytes, remedy)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """One server: an engine and its HTTP socket. Without `lora_roots` adapters are loaded from `lora_dir` only."""

    engine: EngineConfig = EngineConfig()
    host: Annotated[str, Option("server", TEXT, "address to listen at")] = "127.0.0.1"
    port: Annotated[int, Option("server", PORT, "TCP port to listen at; 0 picks a free one")] = 8000
    grpc_port: Annotated[
        int | None,
        Option("server", PORT, "TCP port of gRPC, at the same host; 0 picks a free one", note="none: off"),
    ] = None
    log_level: Annotated[
        LogLevel, Option("server", one_of(LogLevel, "LEVEL"), "least level of what is logged")
    ] = "info"
    audit_log: Annotated[
        Path | None, Option("server", FILE, "file of JSON lines, one for each load or unload; none: the log")
    ] = None
    access_log: Annotated[
        AccessLog, Option("server", one_of(AccessLog, "FORMAT"), "one line for each HTTP request")
    ] = "off"
    access_log_file: Annotated[
        Path | None, Option("server", FILE, "where access lines go; none: the log")
    ] = None
    otlp_endpoint: Annotated[
        str | None,
        Option("server", ENDPOINT, "where spans of requests go, by OpenTelemetry's protocol over gRPC",
               variable="OTEL_EXPORTER_OTLP_ENDPOINT", note="needs the extra otel; none: no spans are made"),
    ] = None  # fmt: skip
    max_waiting: Annotated[int, Option("server", COUNT, "requests that may queue before 429")] = (
        DEFAULTS.max_waiting
    )
    metrics_adapters: Annotated[
        int, Option("server", COUNT, "adapters with metrics of their own, the most recent; others are summed")
    ] = 200
    drain_s: Annotated[float, Option("server", SECONDS, "time to finish what runs when told to stop")] = 30.0
    lora_roots: Annotated[
        tuple[Path, ...],
        Option("server", FOLDER, "adapters may be loaded by path from below here", "lora-root", many=True),
    ] = ()
    lora_push_dir: Annotated[
        Path | None,
        Option(
            "server",
            DIRECTORY,
            "keep adapters here that are sent as bytes",
            note="in a cluster a folder of all members",
        ),
    ] = None
    access: AccessConfig = _OPEN
    http: HttpConfig = _BOUNDED
    batches: BatchesConfig = _NO_BATCHES
    cluster: ClusterConfig = _SINGLE
    launch: LaunchConfig = _LOCAL
    tenants: TenantsConfig = _NO_TENANTS

    def __post_init__(self) -> None:
        check_fields(self)
        self.launch.check_cluster(self.cluster)
        if self.access_log_file is not None and self.access_log == "off":
            remedy = "it does nothing without --access-log: give text or json there, or leave it out"
            raise InvalidConfig("access_log_file", str(self.access_log_file), remedy)
        if self.batches.batch_dir is not None and self.cluster.role in ("node", "coordinator"):
            remedy = f"clients send files to a router: leave it out of --role {self.cluster.role}"
            raise InvalidConfig("batch_dir", str(self.batches.batch_dir), remedy)
        if self.batches.batch_dir is not None and self.cluster.nodes and self.cluster.routers > 1:
            raise InvalidConfig(
                "batch_dir", str(self.batches.batch_dir), "one router keeps files: give --routers 1"
            )
        self.tenants.read_for(self.access, self.cluster)
        known = {key_name(key) for key in self.access.read_api_keys()}
        for tenant in self.cluster.tenant_weights or ():
            if tenant not in known:
                remedy = "no API key has that name: give the eight digits that logs call one by"
                raise InvalidConfig("tenant_weight", tenant, remedy)


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """One batch: an engine, the requests' file and the results' file; `in_flight` lines run at once."""

    input: Annotated[Path, Option("batch", FILE, "requests, one JSON object a line", short="-i")]
    output: Annotated[
        Path, Option("batch", FILE, "results; lines that it already holds are not redone", short="-o")
    ]
    engine: EngineConfig = EngineConfig()
    in_flight: Annotated[int, Option("batch", COUNT, "lines that run at once")] = 128
    retry_errors: Annotated[
        bool, Option("batch", FLAG, "do lines again whose result is an error, and drop those results")
    ] = False

    def __post_init__(self) -> None:
        check_fields(self)
