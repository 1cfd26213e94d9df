"""Answer a peer that asks for what is not published yet.

A name is told while it is known here, a content may be pulled while it is anywhere on this node; both are published
when first asked for. No peer is ever asked on another's behalf, so that no question goes in circles.
"""

import logging
from concurrent.futures import Executor, Future

from lora.adapter import is_name
from lora.daemon_threads import CallHangs, DaemonExecutor
from lora.errors import AdapterLost, AdapterRefused
from lora.memory.pages import RankPages
from lora.peers.manifest import digest_in_layout, name_in_manifest, published_digest
from lora.peers.published_manifests import PublishedManifests
from lora.peers.published_weights import LocalAdapters, PublishedWeights
from lora.peers.regions import ManifestBuffers, PageRegions
from transport.base import Transport

_WORKERS = 2
_log = logging.getLogger(__name__)


class Publisher:
    """What this node publishes: `manifests` and `weights`, which whoever changes names and contents keeps up to date.

    It has no lock. Nothing waits but the jobs of its executor.
    """

    def __init__(
        self,
        base: str,
        transport: Transport,
        pages: PageRegions,
        buffers: ManifestBuffers,
        copies: RankPages,
        executor: Executor | None = None,
    ) -> None:
        """Publish nothing yet. `base` is the base model's digest, `pages` the arena of resident contents.

        Contents that are not resident are copied to `copies`, by `executor`: of `_WORKERS` threads if not given.
        """
        self._base = base
        self._transport = transport
        self._executor = executor or DaemonExecutor(_WORKERS, "adapter-publish")
        self.manifests = PublishedManifests(base, transport, buffers)
        self.weights = PublishedWeights(transport, pages, copies, self._executor)

    def open(self, local: LocalAdapters) -> None:
        """Let peers also have what is on this node and not resident."""
        self._transport.memory.publish_on_demand(lambda published: self._publish(published, local))

    def close(self) -> None:
        """Make no more copies, and wait for those under way, as long as the executor waits."""
        self._transport.memory.publish_on_demand(lambda published: None)
        self._executor.shutdown(wait=True)

    def _publish(self, published: str, local: LocalAdapters) -> Future[None] | None:
        """Begin to publish what a peer asks for. See Transport."""
        digest = published_digest(published)
        if digest is not None:
            return self.weights.publish_copy(digest, local)
        if (digest := digest_in_layout(self._base, published)) is not None:
            return _done() if self._publish_layout(digest, local) else None
        name = name_in_manifest(self._base, published)
        if name is None or not is_name(name):
            return None
        if not self.manifests.publish(name):
            return self._executor.submit(self._read, name, local) if local.declares(name) else None
        return _done()

    def _publish_layout(self, digest: str, local: LocalAdapters) -> bool:
        """Publish how a content that this node knows is laid out; False if it knows none."""
        layout = local.layout(digest)
        if layout is None:
            return False
        return self.manifests.publish_layout(layout.ref(digest, ""), layout)

    def _read(self, name: str, local: LocalAdapters) -> None:
        """Read a declared folder and publish its manifest. Runs on the executor."""
        try:
            local.read(name)
        except (AdapterRefused, AdapterLost, CallHangs) as error:
            _log.warning("%s", error)
        self.manifests.publish(name)


def _done() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done
