"""Where an adapter's bytes come from when it is not resident: host memory, disk, its PEFT folder.

A tier is asked for a digest and copies that content into a destination, or says that it has not got it. The
room decides nothing: what is kept and what is asked first is the store's business.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lora.daemon_threads import CallHangs, DeadlineCalls
from lora.errors import AdapterLost, AdapterRefused
from lora.format.adapter_files import Flaw
from lora.format.allowed_roots import AdapterFolder
from lora.format.companions import Companions, CompanionsCheck, read_companions, read_vocabulary
from lora.format.folder_stamp import FolderStamp, folder_stamp
from lora.format.packed import InvalidHeader
from lora.format.peft import PackedAdapter, pack
from lora.sources.source_folders import SourceFolders
from lora.store.packed_file import read_rows, remove_file, status_of, write_packed
from lora.target_modules import BaseShape

R = TypeVar("R")
_log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"


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

    def having(self, digests: Set[str]) -> Set[str]:
        """Return those of the contents that are here. It may wait, and may miss what does not answer in time."""
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

    def having(self, digests: Set[str]) -> Set[str]:
        """As PackedTier.having."""
        with self._lock:
            return digests & self._rows.keys()

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
    `files` bounds how long a file is waited for.
    """

    name = "disk"

    def __init__(
        self, folder: Path, capacity_bytes: int | None = None, files: DeadlineCalls | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._files = files or DeadlineCalls()

    def cost_s(self, nbytes: int) -> float:
        """At a disk's speed."""
        return 1e-3 + nbytes / 1e9

    def put(self, packed: PackedAdapter) -> None:
        """Write the content's file unless it is there. Raises CallHangs too."""
        path = self._path(packed.ref.digest)
        self._files.run(str(path), lambda: write_packed(path, packed))

    def fetch(self, digest: str, destination: Tensor) -> bool:
        """As Tier.fetch."""
        path = self._path(digest)
        try:
            rows = self._files.run(str(path), lambda: read_rows(path, digest, destination.numel()))
        except FileNotFoundError:
            return False
        except CallHangs as error:
            _log.warning("%s", error)
            return False
        except (Flaw, InvalidHeader) as error:
            _log.warning("%s does not hold the content it is named for: removing it (%s)", path, error)
            remove_file(path)
            return False
        destination[: rows.numel()].copy_(rows)
        return True

    def having(self, digests: Set[str]) -> Set[str]:
        """As PackedTier.having."""
        try:
            listed = self._files.run(
                str(self._folder), lambda: [path.stem for path in self._folder.iterdir()]
            )
        except (CallHangs, OSError):
            return frozenset()
        return digests & set(listed)

    def trim(self, keep: Container[str]) -> None:
        """As PackedTier.trim, over all files of the folder."""
        capacity_bytes = self._capacity_bytes
        if capacity_bytes is None:
            return
        with suppress(CallHangs):  # it is trimmed when the next content comes
            self._files.run(str(self._folder), lambda: self._trim(keep, capacity_bytes))

    def _trim(self, keep: Container[str], capacity_bytes: int) -> None:
        files = [(found, path) for path in self._folder.glob(f"*{_SUFFIX}") if (found := status_of(path))]
        files.sort(key=lambda found: found[0].st_mtime_ns)
        sizes = {path.stem: stat.st_size for stat, path in files}
        for digest in _surplus(sizes, capacity_bytes, keep):
            remove_file(self._path(digest))

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}{_SUFFIX}"


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    folder: AdapterFolder


class SourceTier:
    """The PEFT folders themselves, packed again and checked against the digest that is asked for.

    What a folder's URL names is fetched first, by `fetched`.
    """

    name = "source"

    def __init__(
        self,
        base: BaseShape,
        dtype: torch.dtype,
        files: DeadlineCalls | None = None,
        fetched: SourceFolders | None = None,
    ) -> None:
        self._base = base
        self._dtype = dtype
        self._fetched = fetched or SourceFolders()
        self._files = files or DeadlineCalls()
        self._lock = threading.Lock()
        self._sources: dict[str, _Source] = {}

    def cost_s(self, nbytes: int) -> float:
        """A disk's, and the packing."""
        return 1e-2 + nbytes / 0.3e9

    def pack(self, name: str, folder: AdapterFolder, most_bytes: int) -> PackedAdapter:
        """Read a folder and pack what it holds. Raises AdapterRefused, which may pass if it does not answer."""
        base, dtype, path, roots = self._base, self._dtype, folder.path, folder.roots
        return self._in_time(name, folder, lambda: pack(name, path, base, dtype, most_bytes, roots))

    def stamp(self, name: str, folder: AdapterFolder) -> FolderStamp:
        """Look at a folder without reading it; a URL is asked for its files anew.

        Raises AdapterRefused, which may pass, if it does not answer.
        """
        return self._in_time(name, folder, lambda: folder_stamp(folder.path), fresh=True)

    def _in_time(self, name: str, folder: AdapterFolder, call: Callable[[], R], fresh: bool = False) -> R:
        if folder.url:
            return self._fetched.reading(name, folder, fresh, call)
        try:
            return self._files.run(str(folder.path), call)
        except CallHangs as error:
            told = str(error).replace(error.what, "its folder")  # clients need not know which one
            raise AdapterRefused(name, told, may_pass=True) from error

    def companions(self, name: str, folder: AdapterFolder, check: CompanionsCheck) -> Companions:
        """Read and check what lies beside the weights. Raises as `pack`."""

        def read() -> Companions:
            companions = read_companions(folder.path, folder.roots)
            check(companions, read_vocabulary(folder.path, folder.roots))
            return companions

        try:
            return self._in_time(name, folder, read)
        except Flaw as flaw:
            raise AdapterRefused(name, str(flaw), flaw.may_pass) from flaw

    def remember(self, digest: str, name: str, folder: AdapterFolder) -> None:
        """Note that `folder` holds this content."""
        with self._lock:
            self._sources[digest] = _Source(name, folder)

    def forget(self, digest: str) -> None:
        """Forget a content that nobody will ask for again."""
        with self._lock:
            self._sources.pop(digest, None)

    def having(self, digests: Set[str]) -> Set[str]:
        """As PackedTier.having; what a folder holds now is not looked at."""
        with self._lock:
            return digests & self._sources.keys()

    def fetch(self, digest: str, destination: Tensor) -> bool:
        """As Tier.fetch."""
        with self._lock:
            source = self._sources.get(digest)
        if source is None:
            return False
        try:
            packed = self.pack(source.name, source.folder, destination.numel())
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
