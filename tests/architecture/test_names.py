"""Names: one class has a name, and one module of a package has a file name, so that a word leads to one place."""

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.architecture.source import Source, write

CLASSES_TWICE: Mapping[str, str] = {}
"""Class names that may be there more than once, each with the reason."""

FILES_TWICE: Mapping[str, str] = {
    "base.py": "every seam has its protocol in one",
    "choice.py": "every seam's backend is chosen in one",
    "errors.py": "a folder with a border of its own refuses in its own words",
    "baselines.py": "every kind of policy has those that others are measured by",
}
"""File names that a package may have in several folders, each with the reason."""


def classes_twice(sources: Sequence[Source], allowed: Mapping[str, str] = CLASSES_TWICE) -> list[str]:
    """Find class names, of any depth and privacy, that are defined more than once."""
    places: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for _, node in source.definitions():
            if isinstance(node, ast.ClassDef):
                places[node.name].append(source.at(node))
    return [
        f"{name} is defined at {' and '.join(at)}"
        for name, at in sorted(places.items())
        if len(at) > 1 and name not in allowed
    ]


def files_twice(sources: Sequence[Source], allowed: Mapping[str, str] = FILES_TWICE) -> list[str]:
    """Find file names that one package has in several folders."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source in sources:
        if not source.is_init:
            places[source.package, source.path.name].append(str(source.path))
    return [
        " and ".join(at) for (_, name), at in sorted(places.items()) if len(at) > 1 and name not in allowed
    ]


def test_no_class_name_is_there_twice(library: Sequence[Source]) -> None:
    found = classes_twice(library)
    assert not found, "\n".join(found)


def test_no_file_name_is_there_twice_in_one_package(library: Sequence[Source]) -> None:
    found = files_twice(library)
    assert not found, "\n".join(found)


def test_a_class_name_in_two_packages_is_found(tmp_path: Path) -> None:
    sources = write(tmp_path, {"lora/a.py": "class Room: ...\n", "engine/b.py": "x = 1\nclass Room: ...\n"})
    assert classes_twice(sources) == ["Room is defined at engine/b.py:2 and lora/a.py:1"]


def test_a_class_name_twice_in_one_file_is_found(tmp_path: Path) -> None:
    text = "class A:\n    class Ask: ...\ndef f() -> None:\n    class Ask: ...\n"
    assert classes_twice(write(tmp_path, {"lora/a.py": text})) == [
        "Ask is defined at lora/a.py:2 and lora/a.py:4"
    ]


def test_a_protocol_and_what_implements_it_may_not_share_a_name(tmp_path: Path) -> None:
    files = {"lora/base.py": "class Tier(Protocol): ...\n", "lora/disk.py": "class Tier(base.Tier): ...\n"}
    assert len(classes_twice(write(tmp_path, files))) == 1


def test_private_classes_count_too(tmp_path: Path) -> None:
    assert len(classes_twice(write(tmp_path, {f"lora/{name}.py": "class _Run: ...\n" for name in "ab"}))) == 1


def test_a_class_that_is_allowed_twice_and_different_names_are_no_offence(tmp_path: Path) -> None:
    sources = write(
        tmp_path, {f"lora/{name}.py": f"class Run: ...\nclass {name.upper()}: ...\n" for name in "ab"}
    )
    assert classes_twice(sources, {"Run": "a reason"}) == []


def test_a_file_name_in_two_folders_of_a_package_is_found(tmp_path: Path) -> None:
    sources = write(
        tmp_path, dict.fromkeys(["engine/batch.py", "engine/group/batch.py", "model/batch.py"], "")
    )
    assert files_twice(sources) == ["engine/batch.py and engine/group/batch.py"]


def test_a_file_name_twice_in_each_of_two_packages_is_found_in_both(tmp_path: Path) -> None:
    files = ["engine/batch.py", "engine/a/batch.py", "model/batch.py", "model/a/batch.py"]
    assert len(files_twice(write(tmp_path, dict.fromkeys(files, "")))) == 2


def test_inits_and_the_files_of_seams_may_be_in_every_folder(tmp_path: Path) -> None:
    files = [f"model/{folder}/{name}.py" for folder in "ab" for name in ("__init__", "base", "choice")]
    assert files_twice(write(tmp_path, dict.fromkeys(files, ""))) == []
