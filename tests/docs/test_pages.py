"""The pages' form: narrow lines, short front pages, links that lead somewhere, complete indexes."""

import re

import pytest

from tests.docs.pages import ROOT, Page, all_pages, read_page, tree

PAGES = all_pages()
MOST_CHARACTERS = 100
MOST_LINES = {"README.md": 119, "ARCHITECTURE.md": 149}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_wider_than_a_page(page: Page) -> None:
    lines = enumerate(page.text.splitlines(), 1)
    assert [number for number, line in lines if len(line) > MOST_CHARACTERS] == []


@pytest.mark.parametrize(("name", "most"), MOST_LINES.items())
def test_a_front_page_stays_short(name: str, most: int) -> None:
    assert len(read_page(name).text.splitlines()) <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_its_heading(page: Page) -> None:
    assert [target for target in page.links if not _leads(page, target)] == []


def test_every_decision_is_in_the_index_under_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = [page for page in PAGES if page.path.parent == folder and page.path.name != "README.md"]
    titled = [(page.path.name, page.text.splitlines()[0].removeprefix("# ")) for page in pages]
    assert [title.split(".")[0] for _, title in titled] == [str(n) for n in range(1, len(pages) + 1)]
    index = read_page("docs/decisions/README.md").text
    rows = re.findall(r"^\| \[(\d+)\]\((\S+)\) \| (.+) \|$", index, re.MULTILINE)
    assert [(name, f"{int(number)}. {title}") for number, name, title in rows] == titled


def test_the_glossary_is_in_alphabetical_order_without_repetition() -> None:
    rows = re.findall(r"^\| (.+?) \| .+ \|$", read_page("docs/glossary.md").text, re.MULTILINE)
    words = [row.replace("`", "").lower() for row in rows[1:]]
    assert len(words) > 50
    assert words == sorted(set(words))


def test_every_page_of_docs_is_linked_from_a_front_page() -> None:
    fronts = [read_page(name) for name in MOST_LINES]
    linked = {(front.path.parent / target).resolve() for front in fronts for target in front.links}
    assert [
        page.name for page in PAGES if page.path.parent == ROOT / "docs" and page.path not in linked
    ] == []


def test_code_and_prose_are_told_apart() -> None:
    page = Page(
        ROOT / "x.md", "a `b`\n\n    c\n\n    d\n\n- e\n  `f\n  g`\n\n```\nh `i`\n```\nj [k](l.md#m)\n"
    )
    assert page.blocks == ("c\n\nd\n", "h `i`")
    assert page.spans == ("b", "f g")
    assert page.links == ("l.md#m",)


def test_a_tree_is_read_as_paths() -> None:
    assert tree("a/  one\n    b/  two\n        c/  three\nd/") == ["a", "a/b", "a/b/c", "d"]


def _leads(page: Page, target: str) -> bool:
    path, _, anchor = target.partition("#")
    found = (page.path.parent / path).resolve() if path else page.path
    return found.exists() and (not anchor or anchor in Page(found, found.read_text()).anchors)
