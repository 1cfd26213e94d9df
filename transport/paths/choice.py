"""Which doors a node has: the stream always, UCX where it is installed and wanted."""

import logging

from transport.errors import DoorUnavailable
from transport.paths.base import AUTO, Door
from transport.paths.cuda_copy import CudaCopy
from transport.paths.stream import StreamDoor
from transport.paths.ucx import UcxDoor

SETTINGS = (AUTO, UcxDoor.name, StreamDoor.name)

log = logging.getLogger(__name__)


def open_doors(node: str, setting: str = AUTO, open_network: bool = False) -> list[Door]:
    """This node's doors, best first. `setting` "auto" takes UCX if it starts, "ucx" insists, "stream" does without.

    `open_network` lets UCX use plain TCP beyond this machine, where whoever reaches its port can read and write
    registered memory: for isolated networks only. DoorUnavailable if UCX is insisted on and does not start.
    """
    if setting not in SETTINGS:
        raise ValueError(f"door {setting!r}: choose one of {', '.join(SETTINGS)}")
    stream = StreamDoor(_device_copy())
    if setting == StreamDoor.name:
        return [stream]
    try:
        return [UcxDoor(node, open_network), stream]
    except DoorUnavailable as missing:
        if setting == UcxDoor.name:
            raise
        log.info("bytes go by stream only: %s", missing)
        return [stream]


def _device_copy() -> CudaCopy | None:
    try:
        return CudaCopy()
    except DoorUnavailable as missing:
        log.debug("%s", missing)
        return None
