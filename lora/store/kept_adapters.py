"""Keep on a node what a coordinator wants there, and tell where each content is.

A content that is not known here is learnt from other members, by its digest: one of them tells its layout, and the
bytes come from whoever has them. So it does not matter what its name means by then. What is kept stays known, and
comes back to device memory when there are free pages. It gives way only to what requests need. What cannot be had is
kept no more, and told.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from lora.adapter import AdapterRef
from lora.errors import AdapterRefused, UnknownAdapter
from lora.format.allowed_roots import AdapterFolder
from lora.format.packed import PackedLayout
from lora.peers.directory import KnownHolders, ReportedDirectory
from lora.sources.source_url import SourceUrl
from lora.store.contents import Contents
from lora.store.loader import AdapterLoader
from lora.store.registry import AdapterRegistry
from transport.base import Address

Told = Callable[[AdapterRef], object]
ToldFailure = Callable[[AdapterRef, Exception], object]
_MOST_LEARNT = 4096
_MOST_HOLDERS = 16_384  # digests of which it is remembered who has them


class KeptAdapters:
    """What is kept for a coordinator. Every method may be called from any thread.

    `_lock` guards what is kept and who has what, and comes before the lock of Contents. Nobody is told under it.
    """

    def __init__(
        self, registry: AdapterRegistry, loader: AdapterLoader, directory: ReportedDirectory | None
    ) -> None:
        """Keep nothing. Without `directory` there are no members to learn from."""
        self._registry, self._loader, self._directory = registry, loader, directory
        self._contents: Contents = loader.contents
        self._lock = threading.Lock()
        self._kept: dict[str, AdapterRef] = {}
        self._learnt: OrderedDict[str, None] = OrderedDict()  # digests that are known without a name
        self._here: set[str] = set()  # of what is kept, what was last seen in device memory
        self._holders: dict[str, tuple[Address, ...]] = {}
        self._arrived: Told = lambda ref: None
        self._displaced: Told = lambda ref: None
        self._failed: ToldFailure = lambda ref, error: None

    def tell(self, arrived: Told, displaced: Told, failed: ToldFailure) -> None:
        """Call these, from whichever thread, when what is kept comes to device memory, has left it, or cannot come."""
        self._arrived, self._displaced, self._failed = arrived, displaced, failed

    def learn(self, ref: AdapterRef, name: str, sources: Sequence[Address]) -> None:
        """Make a content known by its digest, so that requests may retain it. It waits for files or members.

        Raises UnknownAdapter if neither this node's own name means it nor a member has it; AdapterUnreachable,
        AdapterRefused.
        """
        self._remember(ref.digest, tuple(sources))
        layout = self._contents.layout(ref.digest)
        if layout is None and self._registry.folder(name) is not None:
            with suppress(AdapterRefused):  # what the folder holds now may be another version, and refused
                self._registry.resolve(name)
            layout = self._contents.layout(ref.digest)
        self._hold(ref, layout or self._registry.remote.layout_of(ref))

    def fetch(self, ref: AdapterRef, url: SourceUrl) -> None:
        """Make a content known from the URL that its name was registered from. It waits for the source.

        Raises AdapterRefused, also if another content is there by now.
        """
        packed, folder = self._registry.fetch(ref.name, url)
        if packed.ref != ref:
            raise AdapterRefused(
                ref.name, "its source holds another content than was registered: load it again"
            )
        self._hold(ref, packed.layout, folder)

    def _hold(self, ref: AdapterRef, layout: PackedLayout, folder: AdapterFolder | None = None) -> None:
        """Keep a content known though no name means it here; of many the one that was learnt first is let go."""
        with self._lock:
            if ref.digest in self._learnt:
                self._learnt.move_to_end(ref.digest)
                return
            self._contents.bind(ref, layout, ref.name, folder)
            self._learnt[ref.digest] = None
            oldest = self._learnt.popitem(last=False)[0] if len(self._learnt) > _MOST_LEARNT else None
            if oldest is not None:
                self._contents.unbind(oldest)
        self._contents.advance()

    def keep(self, ref: AdapterRef) -> None:
        """Keep a known content. Raises UnknownAdapter if it was forgotten meanwhile."""
        layout = self._contents.layout(ref.digest)
        if layout is None:
            raise UnknownAdapter(ref.name)
        with self._lock:
            if ref.digest in self._kept:
                return
            self._kept[ref.digest] = ref
            self._contents.bind(ref, layout, ref.name, None)
        self._contents.advance()
        self.look()

    def keeps(self, ref: AdapterRef) -> bool:
        """Tell whether a content is kept."""
        with self._lock:
            return ref.digest in self._kept

    def drop(self, ref: AdapterRef) -> None:
        """Keep a content no more; it is forgotten once no request and no name needs it."""
        with self._lock:
            if self._kept.pop(ref.digest, None) is None:
                return
            self._here.discard(ref.digest)
            self._contents.unbind(ref.digest)
        self._contents.advance()

    def tiers(self) -> Mapping[str, str]:
        """Tell where each known content is, by digest: on the device, or elsewhere on this node or at a member."""
        self.look()
        return self._contents.places()[0]

    def room_bytes(self) -> int:
        """Return the device memory that neither what is kept nor what requests need takes."""
        with self._lock:
            kept = tuple(self._kept)
        return self._contents.places(kept)[1]

    def look(self) -> None:
        """Tell what has come, gone or failed since the last look, and bring what is kept where there are free pages."""
        with self._lock:
            tiers, failures = self._contents.places()[0], self._failures()
            here = {digest for digest in self._kept if tiers.get(digest) == "device"}
            came = [self._kept[digest] for digest in here - self._here]
            went = [self._kept[digest] for digest in self._here - here]
            lacking = [ref for digest, ref in self._kept.items() if digest not in here]
            failed = [(ref, failures[ref.digest]) for ref in lacking if ref.digest in failures]
            for ref, _ in failed:
                del self._kept[ref.digest]
                self._contents.unbind(ref.digest)
            lost = [digest for digest in self._learnt if digest in failures]
            for digest in lost:  # whoever asks for it again learns it anew
                del self._learnt[digest]
                self._contents.unbind(digest)
            self._here = here
        for ref in went:
            self._displaced(ref)
        for ref in came:
            self._arrived(ref)
        for ref, error in failed:
            self._failed(ref, error)
        if failed or lost:
            self._contents.advance()
        given_up = {ref for ref, _ in failed}
        for ref in lacking:
            if ref not in given_up:
                self._loader.load_if_free(ref.digest)

    def _failures(self) -> Mapping[str, Exception]:
        return self._contents.failures(self._kept.keys() | self._learnt.keys())

    def _remember(self, digest: str, sources: tuple[Address, ...]) -> None:
        """Note whom to ask for a content."""
        if self._directory is None or not sources:
            return
        with self._lock:
            self._holders.pop(digest, None)
            self._holders[digest] = sources
            if len(self._holders) > _MOST_HOLDERS:
                del self._holders[next(iter(self._holders))]
            self._directory.update(KnownHolders(sources, dict(self._holders)))
