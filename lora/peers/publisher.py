"""Publisher: all that peers may have of this node, and the answer to a peer that asks for what is not lent yet.

A name is told while it is known here, a content may be pulled while it is anywhere on this node; both are brought out
when first asked for. No peer is ever asked on another's behalf, so that no question goes in circles.
"""

import logging
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from lora.errors import AdapterLost, AdapterRefused
from lora.format.packed import PackedLayout
from lora.memory.base import PageRun
from lora.memory.pages import RankPages
from lora.names import is_name
from lora.peers.manifest import Manifest, name_in_manifest, published_digest
from lora.peers.published_manifests import PublishedManifests
from lora.peers.published_weights import LocalAdapters, PublishedWeights, PublishStats
from lora.peers.regions import ManifestBuffers, PageRegions
from transport.base import Transport

_WORKERS = 2
_log = logging.getLogger(__name__)


class Publisher:
    """What this node lends. Safe to use from any thread; nothing waits but the jobs of its executor."""

    def __init__(
        self,
        base: str,
        transport: Transport,
        pages: PageRegions,
        notebook: ManifestBuffers,
        room: RankPages,
        executor: Executor | None = None,
    ) -> None:
        """`base` is the base model's digest, `pages` the arena of resident contents, `room` where copies of others
        are kept for peers; `executor` brings them there, of `_WORKERS` threads if it is not given."""
        self._base = base
        self._transport = transport
        self._executor = executor or ThreadPoolExecutor(_WORKERS, "adapter-lend")
        self._notes = PublishedManifests(base, transport, notebook)
        self._rows = PublishedWeights(transport, pages, room, self._executor)

    @property
    def stats(self) -> PublishStats:
        """A snapshot."""
        return self._rows.stats

    def open(self, stock: LocalAdapters) -> None:
        """From now on peers may also have what is in `stock` and not resident."""
        self._transport.memory.publish_on_demand(lambda lent: self._bring(lent, stock))

    def close(self) -> None:
        """Finish what is being brought."""
        self._transport.memory.publish_on_demand(lambda lent: None)
        self._executor.shutdown(wait=True)

    def bind(self, note: Manifest) -> None:
        """The note's name means this from now on."""
        self._notes.bind(note)

    def unbind(self, name: str) -> None:
        """`name` means nothing any more."""
        self._notes.unbind(name)

    def lend(self, digest: str, layout: PackedLayout, run: PageRun) -> None:
        """The content is resident in `run` and will not change: let peers have it."""
        self._rows.lend(digest, layout, run)

    def recall(self, digest: str) -> Future[None]:
        """Lend a resident content's pages no more; done when no peer reads them."""
        return self._rows.recall(digest)

    def forget(self, digest: str) -> None:
        """This node does not know the content any more."""
        self._rows.forget(digest)

    def _bring(self, lent: str, stock: LocalAdapters) -> Future[None] | None:
        """A peer asks for what is not lent. See transport.base.PublishOnDemand."""
        digest = published_digest(lent)
        if digest is not None:
            return self._rows.bring(digest, stock)
        name = name_in_manifest(self._base, lent)
        if name is None or not is_name(name):
            return None
        if not self._notes.lend(name):
            return self._executor.submit(self._read, name, stock) if stock.declares(name) else None
        told: Future[None] = Future()
        told.set_result(None)
        return told

    def _read(self, name: str, stock: LocalAdapters) -> None:
        """Read a declared folder and lend its note. Runs on the executor."""
        try:
            stock.read(name)
        except (AdapterRefused, AdapterLost) as error:
            _log.warning("%s", error)
        self._notes.lend(name)
