"""Make a client's environment: a virtual environment, or a folder of Node packages. Nothing is shared between two.

A stamp, written last, holds what was installed. What differs from it is installed anew.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.clients.catalogue import PROGRAMS, Client

ROOT = PROGRAMS.parents[2]
INSTALL_S = 1800
_KEPT = ("HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "XDG_CACHE_HOME")


class ClientMissing(RuntimeError):
    """A client cannot be installed here, or is not on PATH."""


@dataclass(frozen=True, slots=True)
class Environment:
    """How a client's program is started, and what it finds in its environment variables."""

    command: tuple[str, ...]
    variables: Mapping[str, str]


def prepared(client: Client, cache: Path) -> Environment:
    """Install a client unless it is installed already. Raises ClientMissing."""
    match client.installer:
        case "pip":
            return _python(client, cache / client.name)
        case "npm":
            return _node(client, cache / client.name)
        case "system":
            return _system(client)


def _python(client: Client, folder: Path) -> Environment:
    python = folder / "bin" / "python"
    if not _is_installed(client, folder):
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if client.needs_torch:
            _run([*pip, torch_pin()])  # first, so that nothing that follows brings another
        packages = [*client.packages, *([torch_pin()] if client.needs_torch else [])]
        if client.requirements:
            packages += ["-r", str(PROGRAMS.parent / client.requirements)]
        if client.bare:
            _run([*pip, "--no-deps", packages.pop(0)])
        _run([*pip, *packages])
        _stamp(client, folder)
    # -P: the folder of the programs is not searched, so a program may be called like the library it tries.
    module = f"scripts.clients.programs.{client.program.removesuffix('.py')}"
    return Environment((str(python), "-P", "-m", module), _variables(folder / "bin"))


def _node(client: Client, folder: Path) -> Environment:
    node, npm = _found("node"), _found("npm")
    program = folder / client.program
    if not _is_installed(client, folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _run(
            [npm, "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(folder), *client.packages]
        )
        _stamp(client, folder)
    shutil.copyfile(PROGRAMS / client.program, program)  # Node looks for packages beside the program
    return Environment((node, str(program)), _variables())


def _system(client: Client) -> Environment:
    for command in client.commands:
        _found(command)
    module = f"scripts.clients.programs.{client.program.removesuffix('.py')}"
    return Environment((sys.executable, "-P", "-m", module), _variables())


def torch_pin() -> str:
    """Read the release of torch that the project pins, so that no client brings another."""
    found = re.search(r"torch==[0-9.]*", (ROOT / "pyproject.toml").read_text())
    assert found is not None, "pyproject.toml pins torch"
    return found[0]


def _variables(first: Path | None = None) -> dict[str, str]:
    """Select what a program inherits: no keys, no addresses, no settings of other clients."""
    path = os.pathsep.join([*([str(first)] if first else []), os.environ.get("PATH", os.defpath)])
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return kept | offline | {"PATH": path, "PYTHONPATH": str(ROOT)}


def _is_installed(client: Client, folder: Path) -> bool:
    stamp = folder / ".installed"
    return stamp.is_file() and stamp.read_text() == _content(client)


def _stamp(client: Client, folder: Path) -> None:
    (folder / ".installed").write_text(_content(client))


def _content(client: Client) -> str:
    required = (PROGRAMS.parent / client.requirements).read_text() if client.requirements else ""
    return "\n".join([client.installer, sys.version, *client.packages, required])


def _found(command: str) -> str:
    path = shutil.which(command)
    if path is None:
        raise ClientMissing(f"{command} is not on PATH")
    return path


def _run(command: Sequence[str]) -> None:
    """Run an installer. Raises ClientMissing with the last of what it said."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise ClientMissing(f"{command[0]} did not end within {INSTALL_S} s") from None
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip().splitlines()
        raise ClientMissing(f"it cannot be installed: {said[-1] if said else command[0]}")
