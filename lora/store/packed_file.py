"""Keep a packed form as a file: safetensors with the header as metadata.

It knows no folder and no bound. Whatever it does may wait for a file system.
"""

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lora.format.adapter_files import Flaw, read_regular_file
from lora.format.packed import InvalidHeader, digest_of, read_header, write_header
from lora.format.peft import MOST_HEADER_BYTES, PackedAdapter

_ROWS = "rows"
_HEADER = "header"


def write_packed(path: Path, packed: PackedAdapter) -> None:
    """Write a packed form to its file, unless it is there; it appears whole. Raises OSError."""
    if path.exists():
        _mark_used(path)
        return
    partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("xb") as file:
            file.write(_file_header(packed))
            file.write(packed.rows.numpy().data)
        partial.replace(path)
    finally:
        remove_file(partial)


def read_rows(path: Path, digest: str, most_bytes: int) -> Tensor:
    """Read a content: [nbytes] uint8. Raises FileNotFoundError, or Flaw or InvalidHeader if it is not sound.

    It is digested after it was read: whatever becomes of the file, these are the content's bytes.
    """
    content = read_regular_file(path, most_bytes + MOST_HEADER_BYTES)
    header_end = 8 + int.from_bytes(content[:8], "little")
    try:
        text = json.loads(content[8:header_end])["__metadata__"][_HEADER]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InvalidHeader(f"no file of a packed form ({error!r})") from error
    layout = read_header(str(text))
    if not 0 < layout.nbytes == len(content) - header_end:
        raise InvalidHeader(f"{len(content)} bytes, of which {layout.nbytes} should be rows")
    rows = torch.frombuffer(content, dtype=torch.uint8, count=layout.nbytes, offset=header_end)
    if digest_of(layout, rows) != digest:
        raise Flaw("its digest is another")
    _mark_used(path)
    return rows


def remove_file(path: Path) -> None:
    """Remove a file, if it is there and its folder lets it go."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def status_of(path: Path) -> os.stat_result | None:
    """Look at a file, which another process may have removed."""
    try:
        return path.stat()
    except OSError:
        return None


def _mark_used(path: Path) -> None:
    """Date the file now; by itself a file system's clock may tick too seldom to tell two uses apart."""
    now_ns = time.time_ns()
    # A folder may be read-only, or the file gone: it was read, which is what counts.
    with suppress(OSError):
        os.utime(path, ns=(now_ns, now_ns))


def _file_header(packed: PackedAdapter) -> bytes:
    """Write what stands before the rows in a safetensors file."""
    nbytes = packed.rows.numel()
    header = json.dumps(
        {
            "__metadata__": {_HEADER: write_header(packed.layout)},
            _ROWS: {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
