"""Keep which contents are known, who uses each of them, and which are to be loaded next.

A content is one adapter's weights, whatever it is called. All that is decided about it is decided here, under one
lock; AdapterLoader moves its bytes, outside it.
"""

import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from lora.adapter import AdapterRef
from lora.format.allowed_roots import AdapterFolder
from lora.format.packed import PackedLayout
from lora.memory.base import Force, PageRun
from lora.memory.residency import Content, Residency
from lora.peers.published_weights import PublishedWeights
from lora.segments import AdapterWeights
from lora.store.load_queue import LoadQueue
from lora.store.stats import ContentStats
from lora.store.tier_chain import TierChain


class Contents:
    """The known contents. Every method is atomic, and any thread may call it.

    `_lock` guards the residency with its pages, the users counted in each Content, and the load queue. Only this class
    takes it, and waits for nothing under it. A Content's `ref`, `layout` and `nbytes` never change, and its `run` does
    not while it is loaded or leased: they are read without it.

    Lock order: AdapterRegistry's lock, this one, those of PublishedWeights, the tiers and the transport. Under the
    registry's only `bind`, `unbind` and `fail` may be called, and `advance` once it is free again. `start` and
    `notify` are called under neither.
    """

    def __init__(
        self,
        residency: Residency,
        tiers: TierChain,
        published: PublishedWeights | None,
        start: Callable[[Content], None],
        notify: Callable[[], None],
    ) -> None:
        """Know none. `start` begins to load a content into its pages; `notify` tells that a step may find more."""
        self._residency = residency
        self._pages = residency.pages
        self._tiers = tiers
        self._published = published
        self._start = start
        self._notify = notify
        self._lock = threading.Lock()
        self._queue = LoadQueue(residency)
        self._unkept: set[str] = set()  # pulled; kept here once they have run, so that no first step waits
        self._withdrawn: list[tuple[PageRun, Future[None]]] = []  # pages that peers still read
        self._planning = False
        self._loads = 0
        self._load_s = 0.0
        self._leases = 0
        residency.on_recall(self._withdraw)

    def bind(self, ref: AdapterRef, layout: PackedLayout, name: str, folder: AdapterFolder | None) -> None:
        """Count one more name for a content, which `folder` holds if there is one. The caller advances afterwards."""
        with self._lock:
            content = self._residency.admit(ref, layout, self._tiers.reload_s(ref.nbytes))
            content.names += 1
            self._tiers.remember(ref.digest, layout, name, folder)

    def unbind(self, digest: str) -> None:
        """Count one name fewer for a content. The caller advances afterwards."""
        with self._lock:
            if (content := self._residency.find(digest)) is not None:
                content.names -= 1
                self._queue.drop_later(content)

    def fail(self, content: Content, error: Exception) -> None:
        """Give up loading a content that cannot be had. The caller advances afterwards."""
        with self._lock:
            self._residency.abandon(content, error)
            self._queue.drop_later(content)

    def retain(self, digest: str) -> bool:
        """Count one more live request of a content; False if it is gone."""
        with self._lock:
            content = self._residency.find(digest)
            if content is None or not content.wanted:
                return False
            content.retained += 1
            return True

    def release(self, digest: str) -> None:
        """Count one live request fewer."""
        with self._lock:
            content = self._residency.find(digest)
            assert content is not None, f"{digest} was not retained"
            assert content.retained > 0, f"{content.ref} was released more often than retained"
            content.retained -= 1
            self._queue.drop_later(content)
        self.advance()

    def failures(self, also: Container[str] = ()) -> Mapping[str, Exception]:
        """Tell why contents that requests use, and those of `also`, cannot be had, by digest."""
        with self._lock:
            failed = {c.ref.digest: (c.failure, c.retained) for c in self._residency.contents if c.failure}
        return {digest: why for digest, (why, used) in failed.items() if used or digest in also}

    def retained(self) -> set[str]:
        """List the digests that live requests use, whose packed forms must be kept."""
        with self._lock:
            return {c.ref.digest for c in self._residency.contents if c.retained}

    def layout(self, digest: str) -> PackedLayout | None:
        """Tell a known content's layout."""
        with self._lock:
            return content.layout if (content := self._residency.find(digest)) else None

    def places(self, kept: Iterable[str] = ()) -> tuple[dict[str, str], int]:
        """Tell each known content's place, and the bytes that neither `kept` nor requests need. See Residency."""
        with self._lock:
            return self._residency.places(frozenset(kept))

    def begin_plan(self) -> frozenset[str]:
        """Return the resident digests, none of which goes before the next `lease` or `begin_plan`."""
        with self._lock:
            # The last plan was empty: nothing is running that an eviction could stall.
            idle, self._planning = self._planning, False
            self._residency.step += 1
        self.advance(Force.IDLE if idle else Force.NOT_RUNNING)
        with self._lock:
            self._planning = True
            return self._residency.resident()

    def lease(self, refs: Iterable[AdapterRef]) -> tuple[list[Content], dict[str, AdapterWeights]]:
        """Pin the contents that a plan runs, and end the plan; the base model has none."""
        with self._lock:
            contents = [self._residency.known(ref.digest) for ref in refs if not ref.is_base]
            weights = {content.ref.digest: self._residency.lease(content) for content in contents}
            self._leases += len(contents)
            self._planning = False
        self.advance()
        return contents, weights

    def pin(self, content: Content) -> PageRun | None:
        """Pin a content for a copy of its bytes, and return where it lies; None if it is not resident."""
        with self._lock:
            if content.weights is None:
                return None
            content.leases += 1
            return content.run

    def end_lease(self, contents: Sequence[Content]) -> list[Content]:
        """Undo one `lease` or `pin` of each; return those to be kept on this node. The caller advances afterwards."""
        with self._lock:
            for content in contents:
                content.leases -= 1
            kept = () if self._queue.is_closed else self._unkept
            due = [content for content in contents if content.ref.digest in kept]
            self._unkept.difference_update(content.ref.digest for content in due)
            return due

    def request(self, digests: Iterable[str]) -> None:
        """Queue the absent ones of these contents, the most urgent first, in place of what was queued before."""
        with self._lock:
            self._queue.replace(digests)
        self.advance()

    def make_way(self, digest: str | None, running: frozenset[str]) -> frozenset[str]:
        """Empty pages for a content that has waited too long, or for none; return the digests that are to leave."""
        with self._lock:
            self._residency.make_way(self._residency.find(digest or ""), running)
            return self._residency.to_leave()

    def take_free_pages(self, digest: str) -> Content | None:
        """Give an absent content pages that are free, for the caller to fill; None if it has some or there are none."""
        with self._lock:
            content = self._residency.find(digest)
            absent = content if content is not None and content.run is None else None
            return absent if absent and self._residency.reserve(absent, Force.FREE_PAGES) else None

    def arrived(self, content: Content, weights: AdapterWeights, load_s: float, pulled: bool = False) -> None:
        """Make a content resident, whose pages are filled; `pulled` if a peer's bytes did."""
        with self._lock:
            if pulled:
                self._unkept.add(content.ref.digest)
            self._residency.arrive(content, weights)
            if self._published is not None and content.run is not None:
                self._published.publish(content.ref.digest, content.layout, content.run)
            self._loads, self._load_s = self._loads + 1, self._load_s + load_s
            self._queue.drop_later(content)
        self.advance()
        self._notify()

    def retry(self, content: Content, settled: Future[None]) -> None:
        """Load a content into other pages; its old ones are nobody's until `settled` is done."""
        with self._lock:
            run = self._residency.quarantine(content)
            self._queue.put_first(content)
            self._queue.drop_later(content)
        settled.add_done_callback(partial(self._free, run))
        self.advance()
        self._notify()

    def advance(self, force: Force = Force.NOT_RUNNING) -> None:
        """Drop what is unused, give pages to what is queued, and start its loads."""
        if self._queue.is_empty:  # seen without the lock: whoever adds to it calls this method afterwards
            return
        with self._lock:
            if self._planning:
                force = Force.FREE_PAGES
            else:
                for digest in self._queue.drop_unused():
                    self._forget(digest)
            granted = self._queue.grant(force)
            stuck = self._planning and self._queue.would_move()
        self._free_once_read()
        for content in granted:
            self._start(content)
        if stuck:  # an idle loop must begin a step for anything to go
            self._notify()

    def lacking_pages(self) -> int:
        """Return how many more pages at the arena's end a live request's adapter waits for."""
        with self._lock:
            pages = self._pages.pages_for(urgent.nbytes) if (urgent := self._queue.urgent) else 0
            return max(0, pages - self._pages.free_at_end)

    def lacks_headroom(self) -> bool:
        """Tell whether the largest content that is resident would not find its pages once more."""
        with self._lock:
            sizes = [len(c.run) for c in self._residency.contents if c.run is not None]
            return bool(sizes) and self._pages.free_at_end < max(sizes)

    def could_cede(self, pages: int) -> bool:
        """Tell whether `cede` would do something. Between steps, as it."""
        with self._lock:
            return not self._planning and self._residency.can_clear_end(pages)

    def cede(self, pages: int) -> bool:
        """Give up the arena's last `pages` pages if no live request uses what lies there. Between steps."""
        with self._lock:
            if self._planning or not self._residency.can_clear_end(pages):
                return False
            cleared = self._residency.clear_end(pages)
            if cleared:
                self._pages.cede(pages)
        self._free_once_read()
        return cleared

    def extend(self, pages: int) -> None:
        """Take over the arena's next `pages` pages."""
        with self._lock:
            self._pages.extend(pages)
        self.advance()

    def stats(self) -> ContentStats:
        """Take a snapshot."""
        with self._lock:
            pages = self._pages
            return ContentStats(
                census=self._residency.census(),
                total_pages=pages.num_pages,
                free_pages=pages.free_pages,
                loads=self._loads,
                load_s=self._load_s,
                evictions=self._residency.evictions,
                leases=self._leases,
            )

    def close(self) -> None:
        """Start no more loads."""
        with self._lock:
            self._queue.close()

    def _forget(self, digest: str) -> None:
        self._unkept.discard(digest)
        for part in (self._tiers, self._published):
            if part is not None:
                part.forget(digest)

    def _withdraw(self, digest: str, run: PageRun) -> bool:
        """Let peers begin to read a content no more; whether its pages are free at once. Under the lock."""
        if self._published is None:
            return True
        read = self._published.withdraw(digest)
        if not read.done():
            self._withdrawn.append((run, read))
        return read.done()

    def _free_once_read(self) -> None:
        """Free the pages that were withdrawn from peers, each when none reads them: some at once."""
        if self._withdrawn:
            with self._lock:
                withdrawn, self._withdrawn = self._withdrawn, []
            for run, read in withdrawn:
                read.add_done_callback(partial(self._free, run))

    def _free(self, run: PageRun, _: Future[None]) -> None:
        with self._lock:
            self._residency.give_back(run)
        self.advance()
