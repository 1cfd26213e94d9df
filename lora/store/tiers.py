"""Where an adapter's bytes come from when it is not resident: host memory, disk, its PEFT folder.

A tier is asked for a digest and copies that content into a destination, or says that it has not got it. The
room decides nothing: what is kept and what is asked first is the store's business.
"""

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lora.errors import AdapterLost, AdapterRefused
from lora.format.adapter_files import Flaw, read_regular_file
from lora.format.packed import InvalidHeader, digest_of, read_header, write_header
from lora.format.peft import MOST_HEADER_BYTES, PackedAdapter, pack
from lora.target_modules import BaseShape

_log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_ROWS = "rows"
_HEADER = "header"


class Tier(Protocol):
    """A place that may have an adapter's packed form. All methods may be called from any thread."""

    @property
    def name(self) -> str:
        """What metrics call it."""
        ...

    def cost_s(self, nbytes: int) -> float:
        """About how long fetching `nbytes` takes; only the order between tiers and sizes matters."""
        ...

    def fetch(self, digest: str, destination: Tensor) -> bool:
        """Copy the content into the head of `destination` ([at least its nbytes] uint8, any device).

        False if it is not here. Raises AdapterLost if it should be and cannot be had.
        """
        ...


class PackedTier(Tier, Protocol):
    """A tier that keeps what was packed."""

    def put(self, packed: PackedAdapter) -> None:
        """Keep this content. Raises OSError if there is no room for it."""
        ...

    def trim(self, keep: Container[str]) -> None:
        """Forget the contents longest unused until the tier is within its bound; never those in `keep`."""
        ...


class HostTier:
    """Packed forms in host memory, up to `capacity_bytes` beside those that must be kept."""

    name = "host"

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._rows: OrderedDict[str, Tensor] = OrderedDict()  # the longest unused first

    def cost_s(self, nbytes: int) -> float:
        """At memory's speed."""
        return 1e-4 + nbytes / 10e9

    def put(self, packed: PackedAdapter) -> None:
        """Keep the rows themselves, not a copy."""
        with self._lock:
            self._rows[packed.ref.digest] = packed.rows
            self._rows.move_to_end(packed.ref.digest)

    def fetch(self, digest: str, destination: Tensor) -> bool:
        """As Tier.fetch."""
        with self._lock:
            rows = self._rows.get(digest)
            if rows is None:
                return False
            self._rows.move_to_end(digest)
        destination[: rows.numel()].copy_(rows)
        return True

    def trim(self, keep: Container[str]) -> None:
        """As PackedTier.trim."""
        with self._lock:
            sizes = {digest: rows.numel() for digest, rows in self._rows.items()}
            for digest in _surplus(sizes, self._capacity_bytes, keep):
                del self._rows[digest]


class DiskTier:
    """Packed forms as files of one folder, named by digest: safetensors with the header as metadata.

    A file appears whole (by rename) and is not changed. The folder may be shared, so a file's digest is checked at
    every read, of the bytes that are given on; a file that fails is removed. `capacity_bytes` None is no bound.
    """

    name = "disk"

    def __init__(self, folder: Path, capacity_bytes: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._capacity_bytes = capacity_bytes

    def cost_s(self, nbytes: int) -> float:
        """At a disk's speed."""
        return 1e-3 + nbytes / 1e9

    def put(self, packed: PackedAdapter) -> None:
        """Write the content's file unless it is there."""
        path = self._path(packed.ref.digest)
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
            _remove(partial)

    def fetch(self, digest: str, destination: Tensor) -> bool:
        """As Tier.fetch."""
        path = self._path(digest)
        try:
            rows = _read_rows(path, digest, destination.numel())
        except FileNotFoundError:
            return False
        except (Flaw, InvalidHeader) as error:
            _log.warning("%s does not hold the content it is named for: removing it (%s)", path, error)
            _remove(path)
            return False
        destination[: rows.numel()].copy_(rows)
        _mark_used(path)
        return True

    def trim(self, keep: Container[str]) -> None:
        """As PackedTier.trim, over all files of the folder."""
        if self._capacity_bytes is None:
            return
        files = [(found, path) for path in self._folder.glob(f"*{_SUFFIX}") if (found := _stat(path))]
        files.sort(key=lambda found: found[0].st_mtime_ns)
        sizes = {path.stem: stat.st_size for stat, path in files}
        for digest in _surplus(sizes, self._capacity_bytes, keep):
            _remove(self._path(digest))

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}{_SUFFIX}"


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    folder: Path


class SourceTier:
    """The PEFT folders themselves, packed again and checked against the digest that is asked for."""

    name = "source"

    def __init__(self, base: BaseShape, dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype
        self._lock = threading.Lock()
        self._sources: dict[str, _Source] = {}

    def cost_s(self, nbytes: int) -> float:
        """A disk's, and the packing."""
        return 1e-2 + nbytes / 0.3e9

    def remember(self, digest: str, name: str, folder: Path) -> None:
        """Note that `folder` holds this content."""
        with self._lock:
            self._sources[digest] = _Source(name, folder)

    def forget(self, digest: str) -> None:
        """Forget a content that nobody will ask for again."""
        with self._lock:
            self._sources.pop(digest, None)

    def fetch(self, digest: str, destination: Tensor) -> bool:
        """As Tier.fetch."""
        with self._lock:
            source = self._sources.get(digest)
        if source is None:
            return False
        try:
            most_bytes = destination.numel()
            packed = pack(source.name, source.folder, self._base, self._dtype, most_bytes)
        except AdapterRefused as refused:
            raise AdapterLost(source.name, refused.reason) from refused
        if packed.ref.digest != digest:
            raise AdapterLost(
                source.name,
                "its folder was changed after it was loaded: load it again under a name, and keep packed"
                " adapters on disk so that older requests can finish",
            )
        destination[: packed.rows.numel()].copy_(packed.rows)
        return True


def _mark_used(path: Path) -> None:
    """Date the file now; by itself a file system's clock may tick too seldom to tell two uses apart."""
    now_ns = time.time_ns()
    # A folder may be read-only, or the file gone: it was read, which is what counts.
    with suppress(OSError):
        os.utime(path, ns=(now_ns, now_ns))


def _remove(path: Path) -> None:
    """Remove a file, if it is there and its folder lets it go."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _stat(path: Path) -> os.stat_result | None:
    """Look at a file, which another process may have removed."""
    try:
        return path.stat()
    except OSError:
        return None


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


def _read_rows(path: Path, digest: str, most_bytes: int) -> Tensor:
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
    return rows


def _surplus(sizes: dict[str, int], capacity_bytes: int, keep: Container[str]) -> list[str]:
    """Which digests must go, of `sizes` with the longest unused first, for the rest to fit."""
    total = sum(sizes.values())
    surplus: list[str] = []
    for digest, nbytes in sizes.items():
        if total <= capacity_bytes:
            break
        if digest not in keep:
            surplus.append(digest)
            total -= nbytes
    return surplus
