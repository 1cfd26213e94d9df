"""Configuration: what an operator may choose, as frozen values; the command line and TOML files fill them."""

from dataclasses import dataclass, field
from pathlib import Path

from transport.base import Address

PEER_TOKEN_VARIABLE = "LORASERVE_PEER_TOKEN"


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Nodes that share adapters: whom this one asks (`peers`), where they reach it (`listen`), and on what terms.

    Off unless one of the two is given. Peers trust each other by `token` and either certificates (`tls_*`) or, on
    one machine only, `plain`. They must serve the same base model. `lend_bytes` is host memory for lending what is
    not resident; None is as much as the adapters have, at most 1 GiB.
    """

    peers: tuple[Address, ...] = ()
    listen: Address | None = None
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    plain: bool = False
    tls_authority: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_name: str | None = None
    door: str = "auto"  # auto | ucx | stream
    bandwidth_bytes_per_s: int | None = None
    pulls: int = 2
    lend_bytes: int | None = None
    review_s: float = 5.0  # how often names that peers told are asked for again

    @property
    def on(self) -> bool:
        """Whether this node has anything to do with peers."""
        return bool(self.peers) or self.listen is not None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: a base model, its adapters, and how much of the machine it may use.

    `model` is a folder or hub id, None the embedded demo model. `loras` are (name, PEFT folder) pairs loaded
    at start; every PEFT folder below `lora_dir` is known by its folder's name and loaded when first asked
    for. Sizes left None are derived at start from the model and the machine. `lora_dtype` auto is float32 on a
    CPU, else the model's. With `shared_memory` K/V and adapters lend each other what they do not use; auto does so
    on a CUDA device.
    """

    model: str | None = None
    served_model_name: str | None = None
    loras: tuple[tuple[str, Path], ...] = ()
    lora_dir: Path | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16
    lora_dtype: str = "auto"  # auto | float32 | bfloat16 | fp8
    device: str = "auto"  # auto | cpu | cuda
    attention_backend: str = "auto"  # auto | torch | triton | flashinfer
    cuda_graphs: bool = True  # on a CUDA device, decode steps are recorded once and replayed
    tensor_parallel_size: int = 1  # devices that compute each layer together
    quantization: str = "none"  # none | int8 (CPU) | fp8 (CUDA): of the layers' base matrices
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_bytes: int | None = None  # on each device
    adapter_bytes: int | None = None  # memory for resident adapters, on each device
    shared_memory: str = "auto"  # auto | on | off
    adapter_cache_dir: Path | None = None  # packed adapters kept on disk; None keeps none
    adapter_patience_s: float = 2.0
    progress: bool = True
    sharing: PeerConfig = PeerConfig()


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """One server: an engine and its HTTP door. `max_waiting` requests may queue before 429."""

    engine: EngineConfig = EngineConfig()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    log_level: str = "info"  # debug | info | warning
    max_waiting: int = 256
    drain_s: float = 30.0
    lora_roots: tuple[Path, ...] = ()  # load_lora_adapter may read below these only; empty: lora_dir alone


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """One batch: an engine, the requests' file and the results' file; `in_flight` lines run at once."""

    input: Path
    output: Path
    engine: EngineConfig = EngineConfig()
    in_flight: int = 128
