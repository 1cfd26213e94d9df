"""Load contents into their pages, on worker threads and from the first tier that has them."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor

from lora.adapter import AdapterRef
from lora.daemon_threads import CallHangs
from lora.errors import BytesMayLand
from lora.format.peft import PackedAdapter
from lora.memory.residency import Content, Residency
from lora.peers.published_weights import PublishedWeights
from lora.store.contents import Contents
from lora.store.tier_chain import TierChain

_log = logging.getLogger(__name__)


class AdapterLoader:
    """Moves the bytes of `contents`, which says what is loaded where and when. Any thread may call every method.

    `_lock` guards the list of callbacks, nothing else, and nothing is called under it. A content is its loading
    thread's alone from the reservation of its pages until `contents` is told how the load ended.
    """

    def __init__(
        self,
        residency: Residency,
        tiers: TierChain,
        published: PublishedWeights | None,
        executor: Executor,
        lost: Callable[[Content, Exception], None],
    ) -> None:
        """Load with the threads of `executor`; `lost` is told of a content that cannot be had, under no lock."""
        self.contents = Contents(residency, tiers, published, self._start, self.notify)
        self._pages = residency.pages
        self._tiers = tiers
        self._executor = executor
        self._lost = lost
        self._lock = threading.Lock()
        self._callbacks: tuple[Callable[[], None], ...] = ()

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when a step may find more to run, or to fail, than the last one did.

        It is called from any thread, with no lock of the store held.
        """
        with self._lock:
            self._callbacks += (callback,)

    def prefetch(self, refs: Iterable[AdapterRef]) -> None:
        """Ask for these adapters, the most urgent first, in place of what was asked for before. Never waits."""
        self.contents.request(dict.fromkeys(ref.digest for ref in refs))

    def load_if_free(self, digest: str) -> None:
        """Begin to load a known content if it is absent and there are free pages. Never waits."""
        content = self.contents.take_free_pages(digest)
        if content is not None:
            self._start(content)

    def fill(self, packed: PackedAdapter) -> None:
        """Load a known content from its packed form, here and now, if it is absent and there are free pages."""
        content = self.contents.take_free_pages(packed.ref.digest)
        if content is None:
            return
        assert content.run is not None
        started_s = time.perf_counter()
        pages, writer = self._pages.rows(content.run), self._pages.writer
        try:
            staged = writer.staging_buffer(pages, packed.layout)
            staged[: packed.rows.numel()].copy_(packed.rows)
            weights = writer.write(pages, staged, packed.layout, packed.ref.digest)
        except Exception as error:
            self._fail(content, error)
            raise
        self.contents.arrived(content, weights, time.perf_counter() - started_s)

    def end_lease(self, contents: Sequence[Content]) -> None:
        """Undo one lease of each content, and keep on this node what came from a peer and has run now."""
        for content in self.contents.end_lease(contents):
            self._executor.submit(self._keep, content)
        self.contents.advance()

    def close(self) -> None:
        """Start no more loads, and wait for those under way, as long as the executor waits."""
        self.contents.close()
        self._executor.shutdown(wait=True)

    def _start(self, content: Content) -> None:
        self._executor.submit(self._load, content)

    def _load(self, content: Content) -> None:
        """Fill a content's pages from the first tier that has it. Runs on a worker."""
        started_s = time.perf_counter()
        assert content.run is not None
        pages, writer = self._pages.rows(content.run), self._pages.writer
        try:
            staged = writer.staging_buffer(pages, content.layout)
            ref = content.ref
            pulled = self._tiers.fetch(ref.digest, ref.name, staged, ref.nbytes)
            weights = writer.write(pages, staged, content.layout, content.ref.digest)
        except BytesMayLand as unsettled:
            self.contents.retry(content, unsettled.settled)
            return
        except Exception as error:  # noqa: BLE001 - a worker's boundary: told to the requests that wait
            _log.exception("adapter %s could not be brought in", content.ref.name)
            self._fail(content, error)
            return
        self.contents.arrived(content, weights, time.perf_counter() - started_s, pulled=pulled)

    def _keep(self, content: Content) -> None:
        """Keep the packed form of what came from a peer, which may be gone when it is needed again."""
        run = self.contents.pin(content)
        if run is None:
            return
        try:
            rows = self._pages.rows(run)[: content.layout.nbytes].to("cpu", copy=True)
            self._tiers.keep(PackedAdapter(content.ref, content.layout, rows))
            self._tiers.trim(self.contents.retained() | {content.ref.digest})
        except (OSError, CallHangs) as error:
            _log.warning("adapter %s is not kept on disk: %s", content.ref.name, error)
        finally:
            self.end_lease((content,))

    def _fail(self, content: Content, error: Exception) -> None:
        """Have the content's requests told by `contents.failures`, and its names by `lost`."""
        self._lost(content, error)
        self.notify()

    def notify(self) -> None:
        """Tell whoever calls `step` that the next one may find more."""
        for callback in self._callbacks:
            callback()
