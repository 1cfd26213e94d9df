"""Open the data paths that a node has: the stream always, UCX where it is installed and wanted."""

import logging

from transport.errors import PathUnavailable
from transport.paths.base import AUTO, DataPath
from transport.paths.cuda_copy import CudaCopy
from transport.paths.stream import StreamPath
from transport.paths.ucx import UcxPath

SETTINGS = (AUTO, UcxPath.name, StreamPath.name)

log = logging.getLogger(__name__)


def open_paths(node: str, setting: str = AUTO, open_network: bool = False) -> list[DataPath]:
    """Open this node's paths, best first: "auto" takes UCX if it starts, "ucx" insists, "stream" does without.

    `open_network` lets UCX use plain TCP beyond this machine, where whoever reaches its port can read and write
    registered memory: for isolated networks only. Raises PathUnavailable if "ucx" does not start.
    """
    if setting not in SETTINGS:
        raise ValueError(f"path {setting!r}: choose one of {', '.join(SETTINGS)}")
    stream = StreamPath(_device_copy())
    if setting == StreamPath.name:
        return [stream]
    try:
        return [UcxPath(node, open_network), stream]
    except PathUnavailable as missing:
        if setting == UcxPath.name:
            raise
        log.info("bytes go by stream only: %s", missing)
        return [stream]


def _device_copy() -> CudaCopy | None:
    try:
        return CudaCopy()
    except PathUnavailable as missing:
        log.debug("%s", missing)
        return None
