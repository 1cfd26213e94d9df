"""The source tree as text and syntax: what the checks read. It imports nothing that it reads."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("engine", "lora", "model", "scheduler", "transport")
PACKAGES = (*LIBRARY, "scripts")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function


@dataclass(frozen=True, slots=True)
class Source:
    """One Python file: its path from the tree's root, its text, and the text parsed."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """Name the topmost folder."""
        return self.path.parts[0]

    @property
    def is_init(self) -> bool:
        """Tell a folder's `__init__.py`, which is no module of its own."""
        return self.path.name == "__init__.py"

    @property
    def module(self) -> str:
        """Name the file as an import does."""
        return ".".join(self.path.parent.parts if self.is_init else self.path.with_suffix("").parts)

    @property
    def lines(self) -> int:
        """Count the lines, blank ones included."""
        return len(self.text.splitlines())

    def at(self, node: ast.expr | ast.stmt) -> str:
        """Name the place of a node, as editors and terminals open it."""
        return f"{self.path}:{node.lineno}"

    def definitions(self) -> Iterator[tuple[str, Definition]]:
        """Find every class and function at any depth, with its dotted name in the module."""
        return _definitions(self.tree, "")


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield prefix + child.name, child
            yield from _definitions(child, f"{prefix}{child.name}.")
        else:
            yield from _definitions(child, prefix)


def read(packages: Iterable[str], root: Path = ROOT) -> tuple[Source, ...]:
    """Read every Python file below the root's packages, in the order of their paths.

    Raises FileNotFoundError for a package without any, so that no check passes on an empty tree.
    """
    found = {package: sorted(_written((root / package).rglob("*.py"))) for package in packages}
    if empty := [package for package, files in found.items() if not files]:
        raise FileNotFoundError(f"no Python file below {', '.join(empty)} in {root}")
    paths = sorted(path for files in found.values() for path in files)
    texts = ((path.relative_to(root), path.read_text()) for path in paths)
    return tuple(Source(path, text, ast.parse(text)) for path, text in texts)


def _written(paths: Iterable[Path]) -> Iterator[Path]:
    """Leave out what `protoc` made of declarations: nobody wrote it."""
    return (path for path in paths if not path.name.endswith("_pb2.py"))


def write(root: Path, files: dict[str, str]) -> tuple[Source, ...]:
    """Write a made-up tree, and read all of it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read(dict.fromkeys(Path(name).parts[0] for name in files), root)
