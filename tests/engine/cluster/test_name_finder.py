"""A router finds names by their template: once for all who ask, and not again for a while what is not there."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from engine.catalogue.base import CatalogueEntry
from engine.cluster.router.name_finder import NameFinder
from engine.cluster.view import ClusterView
from engine.errors import AdapterAbsent, AdapterExists, EngineError, InvalidAdapter, NotInTime, UnknownModel
from lora.sources.allowed_sources import SourceTemplate
from lora.sources.source_url import AdapterSource
from tests.engine.cluster.control_rig import ref_of

TEMPLATE = SourceTemplate.parse("s3://bucket/{name}")


class FakeAdministration:
    """Registers what it is asked for, unless it is to raise; `view` hears of it later."""

    def __init__(self, view: ClusterView) -> None:
        self.view, self.asked = view, list[tuple[str, str]]()
        self.error: EngineError | None = None

    async def register(self, name: str, folder: AdapterSource, replaces: bool) -> CatalogueEntry:
        assert not replaces, "a name that came to mean something is left as it is"
        self.asked.append((name, str(folder)))
        await asyncio.sleep(0)
        entry = CatalogueEntry(name, ref_of(name), str(folder))
        if self.error is None or isinstance(self.error, AdapterExists):
            asyncio.get_running_loop().call_later(0.01, self._tell, entry)
        if self.error is not None:
            raise self.error
        return entry

    def _tell(self, entry: CatalogueEntry) -> None:
        self.view.catalogue = {**self.view.catalogue, entry.name: entry}
        self.view.tell()


def find(
    visit: Callable[[NameFinder, FakeAdministration], Awaitable[object]],
    template: SourceTemplate | None = TEMPLATE,
    absent_s: float = 60.0,
) -> None:
    async def run() -> None:
        view = ClusterView(known=True)
        administration = FakeAdministration(view)
        finder = NameFinder(view, administration, template, absent_s)  # pyright: ignore[reportArgumentType]
        await visit(finder, administration)
        await finder.close()
        assert not view.changed

    asyncio.run(run())


def test_a_name_is_registered_once_and_heard_of_before_it_is_found() -> None:
    async def visit(finder: NameFinder, administration: FakeAdministration) -> None:
        await asyncio.gather(*(finder.find("a") for _ in range(5)))
        assert administration.asked == [("a", "s3://bucket/a")]
        assert "a" in administration.view.catalogue
        assert not finder.may_find("a")

    find(visit)


def test_a_name_that_another_router_has_found_is_found() -> None:
    async def visit(finder: NameFinder, administration: FakeAdministration) -> None:
        administration.error = AdapterExists("a")
        await finder.find("a")

    find(visit)


def test_an_absent_name_is_not_looked_for_again_for_a_while() -> None:
    async def visit(finder: NameFinder, administration: FakeAdministration) -> None:
        administration.error = AdapterAbsent("nothing there")
        with pytest.raises(UnknownModel):
            await finder.find("a")
        assert not finder.may_find("a")
        await finder.find("a")  # whoever asks is told that the name is unknown
        assert len(administration.asked) == 1

    find(visit)


def test_what_cannot_be_served_is_told_again_without_a_question() -> None:
    async def visit(finder: NameFinder, administration: FakeAdministration) -> None:
        administration.error = InvalidAdapter("rank 0")
        for _ in range(3):
            with pytest.raises(InvalidAdapter, match="rank 0"):
                await finder.find("a")
        assert len(administration.asked) == 1

    find(visit)


def test_what_may_pass_is_asked_for_again() -> None:
    async def visit(finder: NameFinder, administration: FakeAdministration) -> None:
        administration.error = NotInTime("busy", 1)
        with pytest.raises(NotInTime):
            await finder.find("a")
        administration.error = None
        await finder.find("a")
        assert len(administration.asked) == 2

    find(visit)


def test_names_looked_for_at_once_are_bounded() -> None:
    async def visit(finder: NameFinder, administration: FakeAdministration) -> None:
        found = await asyncio.gather(*(finder.find(f"a{n}") for n in range(20)), return_exceptions=True)
        assert [type(each) for each in found if each is not None] == [NotInTime] * 4

    find(visit)


@pytest.mark.parametrize("name", ["a/b", "..", "a b", ""])
def test_a_name_that_could_lead_elsewhere_is_not_looked_for(name: str) -> None:
    async def visit(finder: NameFinder, administration: FakeAdministration) -> None:
        assert not finder.may_find(name)

    find(visit)


def test_nothing_is_looked_for_without_a_template_or_a_coordinator() -> None:
    async def without(finder: NameFinder, administration: FakeAdministration) -> None:
        assert not finder.may_find("a")

    async def unheard(finder: NameFinder, administration: FakeAdministration) -> None:
        administration.view.known = False
        assert not finder.may_find("a")

    find(without, template=None)
    find(unheard)
