"""Load wanted adapters into free pages on worker threads; evict unused ones.

It shares the store's lock and knows no names: who learns that a content was lost is told by `lost`. Nothing resident
goes between `open_plan` and `close_plan`, so that a plan made of what was resident can always run.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from functools import partial

from lora.errors import BytesMayLand
from lora.format.peft import PackedAdapter
from lora.memory.base import Force, PageRun
from lora.memory.residency import Content, Residency
from lora.peers.publisher import Publisher
from lora.segments import AdapterWeights
from lora.store.tier_chain import TierChain

_log = logging.getLogger(__name__)


class AdapterLoader:
    """Moves contents. `residency` and the counts are read under the lock; `lost` is called under it."""

    def __init__(
        self,
        lock: threading.Lock,
        residency: Residency,
        supply: TierChain,
        lending: Publisher | None,
        executor: Executor,
        lost: Callable[[Content], None],
    ) -> None:
        self._lock = lock
        self._pages = residency.pages
        self._supply = supply
        self._lending = lending
        self._executor = executor
        self._lost = lost
        self.residency = residency
        residency.on_recall(self._recall)
        self.loads = 0
        self.load_s = 0.0
        self._wishes: list[Content] = []  # absent and asked for, the most urgent first
        self._doomed: dict[str, Content] = {}  # unwanted, to be dropped as soon as no plan can name them
        self._planning = False
        self._closed = False
        self._callbacks: tuple[Callable[[], None], ...] = ()
        # Pulled, and to be kept once they have run: the first step shall not wait.
        self._unkept: set[str] = set()
        self._recalled: list[tuple[PageRun, Future[None]]] = []  # pages that peers still read

    def on_ready(self, callback: Callable[[], None]) -> None:
        """See AdapterStore."""
        with self._lock:
            self._callbacks += (callback,)

    def open_plan(self) -> frozenset[str]:
        """Digests of the resident contents, which stay until `close_plan`, or until the next plan if it was empty."""
        with self._lock:
            # The last plan was empty: nothing is running that an eviction could stall.
            idle, self._planning = self._planning, False
            self.residency.step += 1
        self.settle(Force.IDLE if idle else Force.NOT_RUNNING)
        with self._lock:
            self._planning = True
            return self.residency.resident()

    def close_plan(self) -> None:
        """What the plan needs is leased. Under the lock."""
        self._planning = False

    def wish(self, digests: Iterable[str]) -> None:
        """Ask for these contents, the most urgent first, in place of what was asked for before. Never waits."""
        with self._lock:
            found = map(self.residency.find, digests)
            self._wishes = [c for c in found if c is not None and c.run is None and c.failure is None]
        self.settle()

    def doom_unwanted(self, content: Content) -> None:
        """Let a content go that nobody can ask for any more. Under the lock; it goes with the next `settle`."""
        if not content.wanted:
            self._doomed[content.ref.digest] = content

    def unpin(self, contents: Sequence[Content]) -> None:
        """Undo one lease of each."""
        with self._lock:
            for content in contents:
                content.leases -= 1
            due = [] if self._closed else [c for c in contents if c.ref.digest in self._unkept]
            self._unkept.difference_update(content.ref.digest for content in due)
        for content in due:
            self._executor.submit(self._keep, content)
        self.settle()

    def fill(self, content: Content, packed: PackedAdapter, started_s: float) -> None:
        """Bring a reserved content in from the form just packed."""
        assert content.run is not None
        place, stowage = self._pages.rows(content.run), self._pages.stowage
        landing = stowage.landing(place, packed.layout)
        landing[: packed.rows.numel()].copy_(packed.rows)
        try:
            weights = stowage.stow(place, landing, packed.layout, packed.ref.digest)
        except Exception as error:
            self._fail(content, error)
            raise
        self._arrive(content, weights, time.perf_counter() - started_s)

    def lacking_pages(self) -> int:
        """How many more pages at the arena's end a live request's adapter waits for."""
        with self._lock:
            if not self._wishes or not self._wishes[0].retained:
                return 0
            return max(0, self._pages.pages_for(self._wishes[0].nbytes) - self._pages.free_at_end)

    def lacks_headroom(self) -> bool:
        """Whether the largest content that is resident would not find its pages once more."""
        with self._lock:
            sizes = [len(c.run) for c in self.residency.contents if c.run is not None]
            return bool(sizes) and self._pages.free_at_end < max(sizes)

    def could_cede(self, pages: int) -> bool:
        """Whether `cede` would."""
        with self._lock:
            return not self._planning and self.residency.can_clear_end(pages)

    def cede(self, pages: int) -> bool:
        """Give up the arena's last `pages` pages if no live request uses what lies there."""
        with self._lock:
            if self._planning or not self.residency.can_clear_end(pages):
                return False
            cleared = self.residency.clear_end(pages)
            if cleared:
                self._pages.cede(pages)
            return cleared

    def extend(self, pages: int) -> None:
        """Take over the arena's next `pages` pages."""
        with self._lock:
            self._pages.extend(pages)
        self.settle()

    def retained(self) -> set[str]:
        """Digests whose packed forms must be kept. Under the lock."""
        return {c.ref.digest for c in self.residency.contents if c.retained}

    def settle(self, force: Force = Force.NOT_RUNNING) -> None:
        """Drop what nobody wants, give wishes their pages, and start the copies."""
        if not self._wishes and not self._doomed:
            return
        with self._lock:
            if self._planning:
                force = Force.FREE_PAGES
            else:
                self._drop_doomed()
            granted = self._grant(force)
            stuck = self._planning and (bool(self._doomed) or self._could_grant())
            recalled, self._recalled = self._recalled, []
        for run, read in recalled:
            read.add_done_callback(partial(self._give_back, run))
        for content in granted:
            self._executor.submit(self._copy, content)
        if stuck:  # an idle loop must begin a step for anything to go
            self._notify()

    def close(self) -> None:
        """Finish the copies under way and start no more."""
        with self._lock:
            self._closed = True
            self._wishes = []
        self._executor.shutdown(wait=True)

    # Granting pages

    def _drop_doomed(self) -> None:
        for digest, content in tuple(self._doomed.items()):
            if content.wanted or self.residency.drop_unwanted(content):
                del self._doomed[digest]
                if not content.wanted:
                    self._unkept.discard(digest)
                    self._supply.forget(digest)
                    if self._lending is not None:
                        self._lending.forget(digest)

    def _grant(self, force: Force) -> list[Content]:
        """Reserve pages for wishes: only the first may displace what live requests use."""
        waiting = [c for c in self._wishes if c.wanted and c.run is None and c.failure is None]
        self._wishes = []
        granted: list[Content] = []
        for content in () if self._closed else waiting:
            urgent = content is waiting[0] and content.retained > 0
            if self.residency.reserve(content, force if urgent else min(force, Force.UNUSED)):
                granted.append(content)
            else:
                self._wishes.append(content)
        return granted

    def _could_grant(self) -> bool:
        """Whether the next step would find room for the most urgent wish."""
        if not self._wishes:
            return False
        content = self._wishes[0]
        return self.residency.could_reserve(content, Force.IDLE if content.retained else Force.UNUSED)

    def _recall(self, digest: str, run: PageRun) -> bool:
        """Stop lending a content that goes; whether its pages are free at once. Under the lock, within `settle`."""
        if self._lending is None:
            return True
        read = self._lending.recall(digest)
        if not read.done():
            self._recalled.append((run, read))
        return read.done()

    def _give_back(self, run: PageRun, _: Future[None]) -> None:
        with self._lock:
            self.residency.give_back(run)
        self.settle()

    # Copying

    def _copy(self, content: Content) -> None:
        """Fill a reserved content from the first tier that has it. Runs on a worker."""
        started_s = time.perf_counter()
        assert content.run is not None
        place, stowage = self._pages.rows(content.run), self._pages.stowage
        try:
            landing = stowage.landing(place, content.layout)
            pulled = self._supply.fetch(content.ref.digest, content.ref.name, landing)
            weights = stowage.stow(place, landing, content.layout, content.ref.digest)
        except BytesMayLand as unsettled:
            self._retry(content, unsettled.settled)
            return
        except Exception as error:  # noqa: BLE001 - a worker's boundary: told to the requests that wait
            _log.exception("adapter %s could not be brought in", content.ref.name)
            self._fail(content, error)
            return
        self._arrive(content, weights, time.perf_counter() - started_s, pulled)

    def _arrive(self, content: Content, weights: AdapterWeights, load_s: float, pulled: bool = False) -> None:
        with self._lock:
            if pulled:
                self._unkept.add(content.ref.digest)
            self.residency.arrive(content, weights)
            if self._lending is not None and content.run is not None:
                self._lending.lend(content.ref.digest, content.layout, content.run)
            self.loads += 1
            self.load_s += load_s
            self.doom_unwanted(content)
        self.settle()
        self._notify()

    def _keep(self, content: Content) -> None:
        """Keep the packed form of what came from a peer, which may be gone when it is needed again."""
        with self._lock:
            if content.run is None or content.weights is None:
                return
            content.leases += 1
            rows = self._pages.rows(content.run)[: content.layout.nbytes]
            keep = self.retained()
        try:
            self._supply.keep(PackedAdapter(content.ref, content.layout, rows.to("cpu", copy=True)))
            self._supply.trim(keep | {content.ref.digest})
        except OSError as error:
            _log.warning("adapter %s is not kept on disk: %s", content.ref.name, error)
        finally:
            self.unpin([content])

    def _retry(self, content: Content, settled: Future[None]) -> None:
        """Bring the content in elsewhere; its pages go when nothing can land there any more."""
        with self._lock:
            run = self.residency.quarantine(content)
            self._wishes.insert(0, content)
            self.doom_unwanted(content)
        settled.add_done_callback(partial(self._give_back, run))
        self.settle()
        self._notify()

    def _fail(self, content: Content, error: Exception) -> None:
        """The content cannot be had: its requests are told by `failed`, its names by `lost`."""
        with self._lock:
            self.residency.abandon(content, error)
            self._lost(content)
            self.doom_unwanted(content)
        self.settle()
        self._notify()

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()
