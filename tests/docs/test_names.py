"""What the pages name exists: folders, files, modules, classes, tests. The trees name every folder once."""

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT, Page, current_pages, read_page, tree

PAGES = current_pages()
TOP = (
    "engine", "scheduler", "model", "lora", "transport", "scripts", "tests", "docs", "examples", "deploy", "results",
)  # fmt: skip
WRITTEN = frozenset({"results/gpu_check.jsonl"})
"""Files that commands of the pages write, and that no checkout has."""

_WORD = r"(?<![\w/.*-])"
_PATH = re.compile(_WORD + r"([\w.*-]+(?:/[\w.*-]+)+)/?(?![\w(])")
_FILE = re.compile(_WORD + r"([\w-]+\.(?:py|sh|md|toml|yaml))(?![\w/])")
_MODULE = re.compile(_WORD + r"((?:engine|scheduler|model|lora|transport|scripts|tests)(?:\.\w+)+)(?![\w/])")
_CLASS = re.compile(r"(?<![\w.])((?:[A-Z][a-z0-9]+){2,})(?!\w)")
_DECLARED = re.compile(r"^\s*(?:message|service|rpc) (\w+)", re.MULTILINE)
_TEST = re.compile(r"(?<!\w)(test_\w+)(?![\w./])")


@functools.cache
def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _packages() -> list[str]:
    return _project()["tool"]["importlinter"]["root_packages"]


def _library_folders() -> list[str]:
    """Every folder of the library that holds a module, as a path from the root."""
    files = [path for package in _packages() for path in (ROOT / package).rglob("*.py")]
    return sorted({path.parent.relative_to(ROOT).as_posix() for path in files})


@functools.cache
def _definitions(path: Path) -> frozenset[str]:
    """The names that a module defines at its top level or imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.alias():
                names.add(node.asname or node.name)
            case _:
                pass
    return frozenset(names)


@functools.cache
def _declared() -> frozenset[str]:
    """The messages, services and calls of the gRPC protocol."""
    texts = (path.read_text() for path in (ROOT / "engine/rpc/wire").glob("*.proto"))
    return frozenset(name for text in texts for name in _DECLARED.findall(text))


@functools.cache
def _defined(*folders: str) -> frozenset[str]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return frozenset[str]().union(*(_definitions(path) for path in paths))


def _paths(page: Page) -> Iterator[str]:
    """Paths in the page's code that begin in a folder of the project, or end as its files do."""
    for code in page.code:
        for word in _PATH.findall(code):
            path = word.rstrip(".")
            if path.startswith("path/to/"):
                continue
            if path.split("/")[0] in TOP or re.search(r"\.(py|sh|md|toml)$", path):
                yield path
        yield from _FILE.findall(code)


def _exists(page: Page, path: str) -> bool:
    """Whether there is such a file or folder, from the root or beside the page. NAME stands for any name."""
    pattern = re.sub(r"\bNAME\b", "*", path)
    return path in WRITTEN or any(any(folder.glob(pattern)) for folder in (ROOT, page.path.parent))


def _resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name that a module defines. Parts in capitals stand for any."""
    folder, parts = ROOT, dotted.split(".")
    for number, part in enumerate(parts):
        if part.isupper():
            return True
        if (folder / part).is_dir():
            folder /= part
            continue
        module = folder / f"{part}.py"
        rest = parts[number + 1 :]
        if not module.is_file():
            module, rest = folder / "__init__.py", parts[number:]
        return not rest or (len(rest) == 1 and module.is_file() and rest[0] in _definitions(module))
    return True


def test_the_architectures_tree_names_every_folder_of_the_library_once() -> None:
    named = tree(read_page("ARCHITECTURE.md").block_below("The folders"))
    assert sorted(named) == _library_folders()


def test_the_readmes_tree_names_every_folder_at_the_root_once() -> None:
    named = tree(read_page("README.md").block_below("Where to read on"))
    assert set(_packages()) < set(named)
    assert sorted(named) == sorted(TOP)
    assert [name for name in named if not (ROOT / name).is_dir()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_code_exists(page: Page) -> None:
    assert [path for path in _paths(page) if not _exists(page, path)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_in_code_exists(page: Page) -> None:
    named = [dotted for code in page.code for dotted in _MODULE.findall(code)]
    assert [dotted for dotted in named if not _resolves(dotted)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_class_in_code_is_defined_in_the_library(page: Page) -> None:
    named = [name for code in page.code for name in _CLASS.findall(code)]
    known = _defined(*_packages()) | _declared()
    assert [name for name in named if name not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_rests_on_exists(page: Page) -> None:
    named = [name for code in page.code for name in _TEST.findall(code)]
    assert [name for name in named if name not in _defined("tests")] == []


def test_names_that_do_not_exist_are_found() -> None:
    text = "`lora/gone.py` `gone.py` `model/*.gone` `engine.gone` `engine.serve.gone` `GoneThing` `test_gone`"
    page = Page(ROOT / "x.md", text)
    assert [path for path in _paths(page) if not _exists(page, path)] == [
        "lora/gone.py", "gone.py", "model/*.gone"
    ]  # fmt: skip
    assert [name for code in page.code for name in _MODULE.findall(code) if not _resolves(name)] == [
        "engine.gone", "engine.serve.gone"
    ]  # fmt: skip
    assert not {"GoneThing", "test_gone"} & (_defined(*_packages()) | _defined("tests") - {"GoneThing"})
