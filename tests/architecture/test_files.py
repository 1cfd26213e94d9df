"""Sizes: folders, files and functions that one person takes in at once."""

import ast
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest

from tests.architecture.source import Function, Source, read, write

MODULES_IN_A_FOLDER = 14
LEAST_MEDIAN_LINES, MOST_FILE_LINES = 80, 300
MOST_FUNCTION_LINES = 60


def full_folders(sources: Sequence[Source]) -> list[str]:
    """Find folders with more modules than one list shows well; folders inside them are not counted."""
    modules = Counter(str(source.path.parent) for source in sources if not source.is_init)
    return [
        f"{folder} holds {count} modules, of {MODULES_IN_A_FOLDER} at most"
        for folder, count in sorted(modules.items())
        if count > MODULES_IN_A_FOLDER
    ]


def long_files(sources: Sequence[Source]) -> list[str]:
    """Find files with too many lines."""
    return [
        f"{source.path} has {source.lines} lines, of {MOST_FILE_LINES} at most"
        for source in sources
        if source.lines > MOST_FILE_LINES and not source.is_init
    ]


def median_lines(sources: Sequence[Source]) -> float:
    """Count the lines of the file in the middle, `__init__.py` apart."""
    return median(source.lines for source in sources if not source.is_init)


def long_functions(sources: Sequence[Source]) -> list[str]:
    """Find functions that no screen shows whole. Triton's kernels are apart: they cannot call as they like."""
    return [
        f"{source.at(node)} {name} has {lines} lines, of {MOST_FUNCTION_LINES} at most"
        for source in sources
        for name, node in source.definitions()
        if isinstance(node, Function) and not _is_kernel(node)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_FUNCTION_LINES
    ]


def _is_kernel(node: Function) -> bool:
    return any(ast.unparse(each).partition("(")[0] == "triton.jit" for each in node.decorator_list)


def test_no_folder_holds_too_many_modules(library: Sequence[Source]) -> None:
    found = full_folders(library)
    assert not found, "\n".join(found)


def test_no_file_is_too_long(library: Sequence[Source]) -> None:
    found = long_files(library)
    assert not found, "\n".join(found)


def test_files_are_not_slivers(library: Sequence[Source]) -> None:
    assert median_lines(library) >= LEAST_MEDIAN_LINES


def test_no_function_is_longer_than_a_screen(library: Sequence[Source]) -> None:
    found = long_functions(library)
    assert not found, "\n".join(found)


def test_a_package_that_is_not_there_does_not_pass_as_one_without_faults(tmp_path: Path) -> None:
    write(tmp_path, {"lora/a.py": ""})
    with pytest.raises(FileNotFoundError, match="no Python file below adapters in"):
        read(["lora", "adapters"], tmp_path)


def test_a_full_folder_is_found(tmp_path: Path) -> None:
    fits = {f"lora/m{number}.py": "" for number in range(MODULES_IN_A_FOLDER)} | {"lora/__init__.py": ""}
    within = {f"lora/ops/m{number}.py": "" for number in range(MODULES_IN_A_FOLDER)}
    assert full_folders(write(tmp_path, fits | within)) == []
    assert full_folders(write(tmp_path, fits | within | {"lora/ops/more.py": ""})) == [
        "lora/ops holds 15 modules, of 14 at most"
    ]


def test_a_long_file_is_found_and_an_init_is_none(tmp_path: Path) -> None:
    fits, long = "x = 1\n" * MOST_FILE_LINES, "x = 1\n" * MOST_FILE_LINES + "\n"
    sources = write(tmp_path, {"lora/a.py": fits, "lora/b.py": long, "lora/__init__.py": long})
    assert long_files(sources) == ["lora/b.py has 301 lines, of 300 at most"]


def test_the_median_is_of_files_and_not_of_inits(tmp_path: Path) -> None:
    sizes = {
        "lora/a.py": 10,
        "lora/b.py": 50,
        "lora/c.py": 200,
        "lora/__init__.py": 1,
        "lora/ops/__init__.py": 1,
    }
    assert median_lines(write(tmp_path, {name: "x = 1\n" * lines for name, lines in sizes.items()})) == 50


@pytest.mark.parametrize("lines", [MOST_FUNCTION_LINES, MOST_FUNCTION_LINES + 1])
@pytest.mark.parametrize("head", ["def f() -> None:", "async def f() -> None:", "@cache\ndef f() -> None:"])
def test_a_long_function_is_found_and_its_decorators_are_not_counted(
    tmp_path: Path, head: str, lines: int
) -> None:
    sources = write(tmp_path, {"lora/a.py": f"{head}\n" + "    x = 1\n" * (lines - 1)})
    assert len(long_functions(sources)) == (lines > MOST_FUNCTION_LINES)


def test_a_long_method_is_named_with_its_class(tmp_path: Path) -> None:
    text = "class C:\n    def f(self) -> None:\n" + "        x = 1\n" * MOST_FUNCTION_LINES
    assert long_functions(write(tmp_path, {"lora/a.py": text})) == [
        "lora/a.py:2 C.f has 61 lines, of 60 at most"
    ]


@pytest.mark.parametrize("decorator", ["@triton.jit", "@triton.jit(do_not_specialize=['n'])"])
def test_a_kernel_may_be_long(tmp_path: Path, decorator: str) -> None:
    text = f"{decorator}\ndef kernel() -> None:\n" + "    x = 1\n" * MOST_FUNCTION_LINES
    assert long_functions(write(tmp_path, {"lora/a.py": text})) == []
