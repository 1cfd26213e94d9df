"""Imports: no module of the library reaches itself again, by an import statement or by a string."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, Source, write

BY_STRING = {"import_module", "__import__"}


def string_imports(sources: Sequence[Source]) -> list[str]:
    """Find calls that import one of the project's packages by a string: types and contracts do not see them."""
    return [
        f"{source.at(call)} imports {text!r} by a string"
        for source in sources
        for call, text in _string_imports(source)
        if text.startswith(".") or text.split(".")[0] in PACKAGES
    ]


def _string_imports(source: Source) -> Iterator[tuple[ast.Call, str]]:
    """Find every import by a string whose beginning is written in the call, with what is written of it."""
    renamed = {
        alias.asname
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and node.module == "importlib"
        for alias in node.names
        if alias.name in BY_STRING and alias.asname
    }
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _called(node) in BY_STRING | renamed:
            named = [keyword.value for keyword in node.keywords if keyword.arg == "name"]
            for given in [*node.args, *named][:1]:
                if (text := _beginning(given)) is not None:
                    yield node, text


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _beginning(node: ast.expr) -> str | None:
    """Return the text that a string begins with: a literal, an f-string, or either with something added."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return _beginning(node.values[0]) if node.values else None
    return _beginning(node.left) if isinstance(node, ast.BinOp) else None


def cycles(sources: Sequence[Source]) -> list[str]:
    """Find groups of modules that import each other, wherever in a module the import is, strings included."""
    arrows = _arrows(sources)
    reached = {module: _reached(module, arrows) for module in arrows}
    groups = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in arrows
        if module in reached[module]
    }
    return sorted(" <-> ".join(sorted(group)) for group in groups)


def _arrows(sources: Sequence[Source]) -> Mapping[str, set[str]]:
    """Find what each module imports of the others."""
    modules = {source.module for source in sources}
    return {source.module: set(_imported(source, modules)) for source in sources}


def _imported(source: Source, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            for alias in node.names:
                yield from [name for name in (f"{base}.{alias.name}", base) if name in modules][:1]
    for _, text in _string_imports(source):
        yield from {text} & modules


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    """Name the module that an import is from, with the dots of a relative one resolved."""
    folders = source.path.parent.parts
    above = folders[: len(folders) - node.level + 1] if node.level else ()
    return ".".join([*above, *([node.module] if node.module else [])])


def _reached(module: str, arrows: Mapping[str, set[str]]) -> set[str]:
    """Find the modules to which one or more imports lead."""
    found: set[str] = set()
    waiting = list(arrows[module])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(arrows[name])
    return found


def test_nothing_of_the_project_is_imported_by_a_string(project: Sequence[Source]) -> None:
    found = string_imports(project)
    assert not found, "\n".join(found)


def test_no_modules_of_the_library_import_each_other(library: Sequence[Source]) -> None:
    found = cycles(library)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        'importlib.import_module("engine.cuda")',
        'importlib.import_module(name="lora.ops")',
        'importlib.import_module(f"scripts.gpu.{name}")',
        'importlib.import_module("model." + name)',
        'importlib.import_module(".cuda", "engine")',
        'import_module("transport")',
        'load("engine.cuda")',
        '__import__("scheduler.step")',
    ],
)
def test_an_import_by_a_string_is_found(tmp_path: Path, line: str) -> None:
    names = "import importlib\nfrom importlib import import_module, import_module as load\n"
    (found,) = string_imports(write(tmp_path, {"engine/a.py": f"{names}{line}\n"}))
    assert found.startswith("engine/a.py:3 imports ")


@pytest.mark.parametrize(
    "line",
    [
        'importlib.import_module("flashinfer")',
        'importlib.import_module("engineering.engine")',
        "importlib.import_module(name)",
        'run([python, "-m", "engine.serve"])',
        '"engine.cuda"',
    ],
)
def test_a_foreign_module_or_a_command_line_is_no_import_of_the_project(tmp_path: Path, line: str) -> None:
    assert string_imports(write(tmp_path, {"engine/a.py": f"import importlib\n{line}\n"})) == []


@pytest.mark.parametrize(
    "line",
    [
        "import engine.a",
        "from engine import a",
        "from engine.a import thing",
        "from . import a",
        "from .a import thing",
        "def late() -> None:\n    from engine.a import thing",
        'import importlib\nimportlib.import_module("engine.a")',
    ],
)
def test_a_cycle_is_found_whichever_way_it_is_closed(tmp_path: Path, line: str) -> None:
    files = {
        "engine/__init__.py": "",
        "engine/a.py": "from engine.b import thing\n",
        "engine/c.py": "import engine.a\n",
    }
    assert cycles(write(tmp_path, files | {"engine/b.py": f"{line}\n"})) == ["engine.a <-> engine.b"]


def test_a_longer_cycle_is_one_group_and_another_is_another(tmp_path: Path) -> None:
    files = {"lora/a.py": "import lora.b", "lora/b.py": "import model.c", "model/c.py": "import lora.a"}
    other = {"model/d.py": "import model.e", "model/e.py": "import model.d\nimport lora.a"}
    assert cycles(write(tmp_path, files | other)) == ["lora.a <-> lora.b <-> model.c", "model.d <-> model.e"]


def test_imports_that_only_lead_down_are_no_cycle(tmp_path: Path) -> None:
    files = {
        "engine/__init__.py": "from engine.a import thing",
        "engine/a.py": "from engine.b import x",
        "engine/b.py": "",
    }
    assert cycles(write(tmp_path, files)) == []
