"""What a path runs, and how long it is: on made-up modules, and once on the embedded model."""

import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from scripts import reading
from scripts.reading import FileRead, Recorder, code_lines, files_read, record, table

SOURCE = '''"""A module."""

from functools import cache  # a comment


def outer(values):
    """Add one to all.

    More of it.
    """
    return [one + 1 for one in values]


class Kept:
    @property
    def value(self):
        # why
        return max((1, 2), key=lambda one: -one)

    def never(self):
        text = """not
a docstring"""
        return text


@cache
def around():
    def inner():
        return 1

    return inner
'''


def _module(folder: Path, text: str = SOURCE) -> ModuleType:
    """Load a module of this text from a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "made_up.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("made_up", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(root: Path, work: Callable[[ModuleType], object]) -> list[FileRead]:
    """Record work on a made-up module, and size up what it read."""
    module = _module(root / "engine")

    def path(recorder: Recorder) -> None:
        with recorder.on():
            work(module)

    return files_read(record(path), root)


def test_code_lines_are_those_without_blanks_comments_and_docstrings() -> None:
    assert code_lines('"""Why.\n\nMore."""\n\nx = 1  # one\n# two\ny = (\n    2,\n)\n') == {5, 7, 8, 9}


def test_a_string_that_is_no_docstring_is_code() -> None:
    assert code_lines('x = """one\ntwo"""\n') == {1, 2}


def test_only_the_functions_that_ran_are_counted(tmp_path: Path) -> None:
    assert _read(tmp_path, lambda module: module.outer([1])) == [FileRead("engine/made_up.py", 31, 16, 1, 2)]


def test_decorators_belong_to_their_function_and_lambdas_to_the_one_around_them(tmp_path: Path) -> None:
    assert _read(tmp_path, lambda module: module.Kept().value) == [
        FileRead("engine/made_up.py", 31, 16, 1, 3)
    ]


def test_the_lines_of_a_nested_function_are_counted_once(tmp_path: Path) -> None:
    read = _read(tmp_path, lambda module: module.around()())
    assert [(file.functions, file.function_code_lines) for file in read] == [(2, 5)]


def test_a_file_that_was_only_imported_is_not_read(tmp_path: Path) -> None:
    assert _read(tmp_path, lambda module: _module(tmp_path / "engine")) == []


def test_files_outside_the_folders_are_not_read(tmp_path: Path) -> None:
    module = _module(tmp_path / "scripts")

    def path(recorder: Recorder) -> None:
        with recorder.on():
            module.outer([1])

    assert files_read(record(path), tmp_path) == []


def test_what_runs_while_the_recorder_is_off_is_not_read(tmp_path: Path) -> None:
    module = _module(tmp_path / "engine")
    assert files_read(record(lambda recorder: module.outer([1])), tmp_path) == []


def test_other_threads_are_recorded_and_so_is_a_loop_that_one_was_in_before(tmp_path: Path) -> None:
    text = "def loop(ask, told):\n    while ask():\n        told()\n\n\ndef told():\n    return 1\n"
    module = _module(tmp_path / "engine", text)
    begun, go, done = threading.Event(), threading.Event(), threading.Event()
    asked: list[bool] = []

    def ask() -> bool:
        begun.set()
        assert go.wait(10)
        asked.append(True)
        return len(asked) == 1

    def path(recorder: Recorder) -> None:
        thread = threading.Thread(target=lambda: (module.loop(ask, module.told), done.set()))
        thread.start()
        assert begun.wait(10)
        with recorder.on():
            go.set()
            assert done.wait(10)
        thread.join()

    assert [file.functions for file in files_read(record(path), tmp_path)] == [2]


def test_nothing_is_watched_any_more_after_a_path_that_failed() -> None:
    def path(recorder: Recorder) -> None:
        raise RuntimeError("a path")

    before = sys.getprofile()
    with pytest.raises(RuntimeError, match="a path"):
        record(path)
    assert before is None
    assert sys.getprofile() is None
    assert threading.getprofile() is None


def test_the_table_has_the_sums_of_each_path() -> None:
    files = [FileRead("a.py", 10, 8, 2, 5), FileRead("b.py", 20, 15, 1, 3)]
    assert table({"a step": files}).splitlines()[2:] == ["| a step | 2 | 30 | 23 | 3 | 8 |"]


@pytest.fixture(scope="module")
def paths() -> dict[str, set[str]]:
    """Name the files that each path reads."""
    return {name: {file.name for file in files_read(record(run))} for name, run in reading.PATHS.items()}


@pytest.mark.slow
def test_a_request_reads_what_a_step_does_and_its_door_beside(paths: dict[str, set[str]]) -> None:
    step, chat, offline = (paths[name] for name in ("decode step", "HTTP chat request", "offline request"))
    assert len(step) > 15
    assert step < chat
    assert step < offline
    assert not any(name.startswith("engine/api/") for name in step)
    # One rule for messages, and one for tools, at both doors.
    tools = {"engine/api/tools/chat_messages.py", "engine/api/tools/tool_fields.py"}
    shared = {"engine/api/parsing.py", "engine/api/schema.py", *tools}
    assert {name for name in offline if name.startswith("engine/api/")} <= shared
    assert any(name.startswith("engine/api/") for name in chat)


def test_an_adapter_that_is_resident_is_not_loaded_again(paths: dict[str, set[str]]) -> None:
    files = set[str]().union(*paths.values())
    assert any(name.startswith("lora/ops/") for name in files)
    assert not any(name.startswith("transport/") or "peft" in name for name in files)
