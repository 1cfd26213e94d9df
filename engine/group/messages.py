"""What the first process tells its workers and hears from them: plain numbers and text, as msgpack.

A worker's life: Load, then Loaded; Reserve, then Ready; then Steps, which are not answered. Beside them, on a channel
of their own so that a load delays no step, Places, each answered by Placed. Failed may come in any answer's stead.
"""

import msgspec


class Load(msgspec.Struct, frozen=True, tag=True):
    """Read part `rank` of `size` of the base model. `device`, `dtype`, `quantization`, `attention` and `lora_dtype` are
    already resolved, `fused` as in Arithmetic; `threads` is how many a CPU may use, 0 for what the system says."""

    folder: str
    rank: int
    size: int
    device: str
    dtype: str
    quantization: str
    attention: str
    lora_dtype: str
    fused: bool
    threads: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The weights are there."""


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Take memory as the first process did, and meet the other devices by the file `rendezvous`. Replayed steps have at
    most `graph_blocks` blocks a sequence."""

    rendezvous: str
    num_blocks: int
    block_size: int
    adapter_bytes: int
    graph_blocks: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Steps and adapters may come."""


class Step(msgspec.Struct, frozen=True, tag=True):
    """What the host must know of a ForwardBatch; its tensors are broadcast among the devices, in one.

    `width` is the block tables'; `segments` are (first row, row after the last, digest). With `replayed` it is a step
    that the first process replays, of `rows` rows, of which the last may be nobody's.
    """

    rows: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    width: int
    num_logits: int
    segments: tuple[tuple[int, int, str], ...]
    replayed: bool


class Place(msgspec.Struct, frozen=True, tag=True):
    """Keep this share of an adapter `offset` bytes into the arena; `nbytes` bytes follow the message. What lay there
    is forgotten. `header` is the share's, as lora.flat writes it."""

    digest: str
    header: str
    offset: int
    nbytes: int


class Placed(msgspec.Struct, frozen=True, tag=True):
    """The share may be named in steps."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot go on, and ends."""

    reason: str


Message = Load | Loaded | Reserve | Ready | Step | Place | Placed | Failed
