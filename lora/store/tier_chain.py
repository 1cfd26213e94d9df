"""Ask the tiers in their order, and count what each of them gave.

It knows where contents may be had and nothing of residency.
"""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor

from lora.adapter import AdapterRef, RemoteName
from lora.daemon_threads import CallHangs, DeadlineCalls
from lora.errors import AdapterLost, AdapterRefused, UnknownAdapter
from lora.format.adapter_files import Flaw
from lora.format.allowed_roots import AdapterFolder
from lora.format.companions import Companions, CompanionsCheck, Vocabulary
from lora.format.folder_stamp import FolderStamp
from lora.format.packed import PackedLayout
from lora.format.peft import PackedAdapter
from lora.peers.manifest import Manifest
from lora.peers.peer_stats import PeerStats
from lora.peers.peer_tier import PeerTier
from lora.sources.source_folders import SourceFolders
from lora.store.tiers import PackedTier, SourceTier, Tier
from lora.target_modules import BaseShape

_log = logging.getLogger(__name__)


class TierChain:
    """Packed forms first, then peers' memory, then the PEFT folders, which must be packed again.

    Any thread may call every method. `_lock` guards the counts; each tier has its own. Nothing is called under them.
    `reload_s`, `remember` and `forget` do not wait, and are called under Contents' lock; all others may wait.
    """

    def __init__(
        self,
        base: BaseShape,
        dtype: torch.dtype,
        packed: PackedTier,
        peers: PeerTier | None,
        files: DeadlineCalls | None = None,
        fetched: SourceFolders | None = None,
    ) -> None:
        self._base = base
        self._dtype = dtype
        self._packed = packed
        self._peers = peers
        self._source = SourceTier(base, dtype, files, fetched)
        self._tiers: tuple[Tier, ...] = (packed, *((peers,) if peers else ()), self._source)
        self._check: CompanionsCheck = lambda companions, vocabulary: None
        self._lock = threading.Lock()
        self._hits = Counter[str]()
        self._fallbacks = Counter[str]()
        self._nbytes = Counter[str]()
        self._seconds = defaultdict[str, float](float)

    @property
    def hits(self) -> Mapping[str, int]:
        """How many contents each tier gave."""
        with self._lock:
            return {tier.name: self._hits[tier.name] for tier in self._tiers}

    @property
    def nbytes(self) -> Mapping[str, int]:
        """How many bytes of contents each tier gave."""
        with self._lock:
            return {tier.name: self._nbytes[tier.name] for tier in self._tiers}

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """How many times each tier was asked in vain, and the next one had to be."""
        with self._lock:
            return {tier.name: self._fallbacks[tier.name] for tier in self._tiers}

    @property
    def seconds(self) -> Mapping[str, float]:
        """How long what each tier gave has taken."""
        with self._lock:
            return {tier.name: self._seconds[tier.name] for tier in self._tiers}

    @property
    def peer_stats(self) -> PeerStats:
        """What the peers gave; zeros without peers."""
        return self._peers.stats if self._peers else PeerStats()

    def reload_s(self, nbytes: int) -> float:
        """Estimate how long it takes to load `nbytes` again."""
        return self._packed.cost_s(nbytes)

    def stamp(self, name: str, folder: AdapterFolder) -> FolderStamp:
        """Look at a folder without reading it. Raises AdapterRefused, which may pass, if it does not answer."""
        return self._source.stamp(name, folder)

    def pack(self, name: str, folder: AdapterFolder, most_bytes: int) -> PackedAdapter:
        """Read a folder, and keep its packed form where there is room for it. Raises AdapterRefused."""
        packed = self._source.pack(name, folder, most_bytes)
        _check_size(name, packed.ref.nbytes, most_bytes)
        try:
            self.keep(packed)
        except (OSError, CallHangs) as error:
            _log.warning(
                "adapter %s is packed again whenever it is loaded, since its packed form cannot be kept (%s):"
                " free space or choose another cache folder",
                name,
                error,
            )
        return packed

    def check_companions(self, check: CompanionsCheck) -> None:
        """Have `check` see what lies beside an adapter's weights, here or at a peer."""
        self._check = check

    def companions(self, name: str, folder: AdapterFolder) -> Companions:
        """Read what lies beside the weights in a folder. Raises AdapterRefused."""
        return self._source.companions(name, folder, self._check)

    def look_up(self, name: str, most_bytes: int) -> Manifest | None:
        """Ask peers what `name` means; None without peers.

        Raises UnknownAdapter, AdapterUnreachable; AdapterRefused for what this base cannot serve.
        """
        if self._peers is None:
            return None
        return self._checked(self._peers.look_up(name), most_bytes)

    def look_up_content(self, ref: AdapterRef, most_bytes: int) -> Manifest:
        """Ask peers how a content is laid out. UnknownAdapter, AdapterUnreachable, AdapterRefused."""
        if self._peers is None:
            raise UnknownAdapter(ref.name)
        return self._checked(self._peers.look_up_content(ref), most_bytes)

    def confirm(self, remote: RemoteName, most_bytes: int) -> Manifest:
        """Ask peers what a remote name means now. UnknownAdapter, AdapterUnreachable, AdapterRefused."""
        assert self._peers is not None, "only peers tell names"
        return self._checked(self._peers.confirm(remote), most_bytes)

    def remember(self, digest: str, layout: PackedLayout, name: str, folder: AdapterFolder | None) -> None:
        """Note that a content has this layout, and may be had from `folder`."""
        if self._peers is not None:
            self._peers.remember(digest, layout)
        if folder is not None:
            self._source.remember(digest, name, folder)

    def forget(self, digest: str) -> None:
        """Forget a content that nobody will ask for again."""
        if self._peers is not None:
            self._peers.forget(digest)
        self._source.forget(digest)

    def keep(self, packed: PackedAdapter) -> None:
        """Keep a packed form. Raises OSError if there is no room for it."""
        self._packed.put(packed)

    def trim(self, keep: Container[str]) -> None:
        """Forget packed forms beyond the bound, but none in `keep`."""
        self._packed.trim(keep)

    def nearest(self, digests: Iterable[str]) -> dict[str, str]:
        """Name the first tier on this node that has each content; what has none here must come from a peer."""
        wanted = frozenset(digests)
        found = dict.fromkeys(wanted, "peer")
        for tier in (self._source, self._packed):
            found.update(dict.fromkeys(tier.having(wanted), tier.name))
        return found

    def fetch(self, digest: str, name: str, destination: Tensor, nbytes: int = 0) -> bool:
        """Fill `destination` from the first tier that has the content, of `nbytes`; whether it came from a peer.

        Raises AdapterLost if none has it, BytesMayLand if the destination must not be used any more.
        """
        for tier in self._tiers:
            started_s = time.perf_counter()
            if tier.fetch(digest, destination):
                with self._lock:
                    self._hits[tier.name] += 1
                    self._nbytes[tier.name] += nbytes
                    self._seconds[tier.name] += time.perf_counter() - started_s
                return tier is self._peers
            with self._lock:
                self._fallbacks[tier.name] += 1
        raise AdapterLost(name, "no tier has its content any more: load it again")

    def fetch_here(self, digest: str, destination: Tensor) -> bool:
        """Fill `destination` from what is on this node: no peer is asked, nothing is counted. Raises AdapterLost."""
        return any(tier.fetch(digest, destination) for tier in self._tiers if tier is not self._peers)

    def _checked(self, told: Manifest, most_bytes: int) -> Manifest:
        """Refuse what this base cannot serve. AdapterRefused."""
        name = told.ref.name
        if not told.layout.fits(self._base) or told.layout.dtype != self._dtype:
            raise AdapterRefused(
                name, "the peer that has it serves another base model or dtype: give both nodes the same"
            )
        _check_size(name, told.layout.nbytes, most_bytes)
        try:
            self._check(told.companions, Vocabulary())
        except Flaw as flaw:
            raise AdapterRefused(name, str(flaw)) from flaw
        return told


def _check_size(name: str, nbytes: int, most_bytes: int) -> None:
    if nbytes > most_bytes:
        raise AdapterRefused(
            name,
            f"it takes {nbytes} bytes, all memory for adapters is {most_bytes} bytes:"
            " give the engine more adapter memory",
        )
