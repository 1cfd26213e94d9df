"""The project's Markdown pages as values: their code, their links, their trees.

Code is what stands in backticks, in fences, or indented by four spaces. Only what these pages use is parsed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE, _INDENT = "```", "    "


@dataclass(frozen=True, slots=True)
class Page:
    """One Markdown file; `path` is absolute."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """The path from the project's root."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Every code block's text, without its indentation or fence."""
        return tuple("\n".join(lines) for is_code, lines in _parts(self.text) if is_code)

    @property
    def prose(self) -> str:
        """Everything but the code blocks."""
        return "\n".join(line for is_code, lines in _parts(self.text) if not is_code for line in lines)

    @property
    def spans(self) -> tuple[str, ...]:
        """What stands in backticks within the prose."""
        return tuple(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose))

    @property
    def code(self) -> tuple[str, ...]:
        """Blocks and spans."""
        return self.blocks + self.spans

    @property
    def links(self) -> tuple[str, ...]:
        """The targets of links and images that are no web addresses."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.prose)
        return tuple(target for target in targets if not re.match(r"\w+:", target))

    @property
    def anchors(self) -> frozenset[str]:
        """What a link to a heading of this page may say after the #."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return frozenset(re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings)

    def block_below(self, heading: str) -> str:
        """The first code block of the section with that heading."""
        section = self.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        return next("\n".join(lines) for is_code, lines in _parts(section) if is_code)


def read_page(name: str) -> Page:
    """The page at `name`, a path from the project's root."""
    return Page(ROOT / name, (ROOT / name).read_text())


def all_pages() -> list[Page]:
    """Every page that readers are sent to, in the order of their names."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return [read_page(path.relative_to(ROOT).as_posix()) for path in sorted(found)]


def current_pages() -> list[Page]:
    """The pages that speak of the project as it is; the change log also names what was."""
    return [page for page in all_pages() if page.name != "CHANGELOG.md"]


def tree(block: str) -> list[str]:
    """The folders that a drawn tree names, one `name/  what it is` a line, four spaces a level."""
    folders: list[str] = []
    above: list[str] = []
    for line in block.splitlines():
        found = re.match(r"( *)([\w.-]+)/(?: |$)", line)
        assert found, f"a line of the tree names no folder: {line!r}"
        level, rest = divmod(len(found[1]), len(_INDENT))
        assert not rest, f"a line of the tree is indented by no whole level: {line!r}"
        assert level <= len(above), f"a line of the tree skips a level: {line!r}"
        above[level:] = [found[2]]
        folders.append("/".join(above))
    return folders


def _parts(text: str) -> Iterator[tuple[bool, list[str]]]:
    """The text as alternating parts, (whether it is a code block, its lines)."""
    lines, is_code, fenced, blank = list[str](), False, False, True
    for line in text.splitlines():
        if line.startswith(_FENCE):
            yield is_code, lines
            fenced = is_code = not fenced
            lines = []
            continue
        indented = line.startswith(_INDENT) and (is_code or blank)
        starts = not fenced and is_code != (indented or (is_code and not line))
        if starts:
            yield is_code, lines
            lines, is_code = [], indented
        lines.append(line.removeprefix(_INDENT) if is_code and not fenced else line)
        blank = not line
    yield is_code, lines
