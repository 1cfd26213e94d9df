"""What a coordinator wants kept, under any sequence of orders, loads, failures and uses: budgets and pins are right."""

import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.adapter import AdapterRef
from lora.errors import AdapterLost, UnknownAdapter
from tests.chance import examples
from tests.lora.store_rig import StoreRig

ADAPTERS, FIT = 4, 2
KINDS = ("keep", "drop", "load", "unload", "use", "break", "mend", "look")
step = st.tuples(st.sampled_from(KINDS), st.integers(0, ADAPTERS - 1))


class Told:
    """What a node's agent would believe: of what is kept, where it is."""

    def __init__(self) -> None:
        self.places: dict[AdapterRef, str] = {}

    def arrived(self, ref: AdapterRef) -> None:
        assert self.places[ref] == "elsewhere", f"{ref.name} came twice"
        self.places[ref] = "device"

    def displaced(self, ref: AdapterRef) -> None:
        assert self.places[ref] == "device", f"{ref.name} went without having come"
        self.places[ref] = "elsewhere"

    def failed(self, ref: AdapterRef, error: Exception) -> None:
        assert isinstance(error, AdapterLost)
        assert self.places.pop(ref) == "elsewhere", f"{ref.name} is told as failed though it is here"


class KeptRig:
    """A store in which some contents cannot be fetched, and what is known to be true of it."""

    def __init__(self, root: Path) -> None:
        self.rig, self.told = StoreRig(root, FIT), Told()
        self.store = self.rig.store
        self.store.kept.tell(self.told.arrived, self.told.displaced, self.told.failed)
        self.broken: set[str] = set()
        self.refs = [self.rig.load(seed) for seed in range(ADAPTERS)]
        tiers, fetch = self.store._tiers, self.store._tiers.fetch

        def failing(digest: str, name: str, destination: Tensor, nbytes: int = 0) -> bool:
            if digest in self.broken:
                raise AdapterLost(name, "the test says so")
            return fetch(digest, name, destination)

        tiers.fetch = failing  # type: ignore[method-assign]

    def take(self, kind: str, at: int) -> None:
        """Do one thing."""
        ref, kept = self.refs[at], self.store.kept
        match kind:
            case "keep" if self.store.contents.layout(ref.digest) is not None:
                self.told.places.setdefault(ref, "elsewhere")
                kept.keep(ref)
            case "drop":
                kept.drop(ref)
                self.told.places.pop(ref, None)
            case "load":
                self.rig.load(at)
            case "unload" if f"a{at}" in self.store.registry.names():
                self.store.registry.unload(f"a{at}")
            case "use":
                self._use(ref)
            case "break":
                self.broken.add(ref.digest)
            case "mend":
                self.broken.discard(ref.digest)
            case _:
                kept.look()

    def check(self) -> None:
        """Check what must hold after every step."""
        residency = self.store.contents._residency
        contents = {content.ref: content for content in residency.contents}
        names = [entry.ref for entry in self.store.registry.entries()]
        for ref, content in contents.items():
            assert content.names == names.count(ref) + (ref in self.told.places), ref.name
            assert (content.retained, content.leases) == (0, 0), ref.name
        assert self.told.places.keys() <= contents.keys()
        runs = sorted((content.run.start, content.run.stop) for content in contents.values() if content.run)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(runs))
        taken = sum(end - start for start, end in runs)
        assert taken + self.rig.pages.free_pages == self.rig.pages.num_pages
        kept_pages = sum(
            len(each.run) for ref, each in contents.items() if each.run and ref in self.told.places
        )
        room = (self.rig.pages.num_pages - kept_pages) * self.rig.pages.page_bytes
        assert self.store.kept.room_bytes() == room

    def check_told(self) -> None:
        """Check, after a look, that what was told is so."""
        self.store.kept.look()
        tiers = self.store.kept.tiers()
        assert {ref: tiers[ref.digest] for ref in self.told.places} == self.told.places
        free = self.rig.pages.free_pages >= self.rig.pages.num_pages // FIT
        lacking = [ref.name for ref, place in self.told.places.items() if place != "device"]
        assert not (free and lacking), f"{lacking} are kept and there is room"

    def _use(self, ref: AdapterRef) -> None:
        try:
            self.store.retain(ref)
        except UnknownAdapter:
            return
        self.store.loader.prefetch((ref,))
        ready = self.store.ready()
        self.store.acquire((ref,) if ref.digest in ready else ()).release()
        assert ref.digest in ready or ref.digest in self.store.failed()
        self.store.release(ref)
        self.store.ready()
        self.store.acquire(()).release()


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(40))
@given(st.lists(step, max_size=40))
def test_any_sequence_of_orders_loads_failures_and_uses_leaves_budgets_and_pins_right(
    steps: list[tuple[str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptRig(Path(folder))
        for kind, at in steps:
            kept.take(kind, at)
            kept.check()
        kept.store.kept.look()  # what fails in this look is told in the next
        kept.check_told()
        for at in range(ADAPTERS):
            kept.take("drop", at)
            kept.take("unload", at)
        kept.store.ready()
        kept.store.acquire(()).release()
        kept.check()
        assert not kept.store.kept.tiers()
        assert kept.rig.pages.free_pages == kept.rig.pages.num_pages
