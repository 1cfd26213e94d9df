"""Run one member of a cluster as an actor of Ray: a process as on any machine, watched by what Ray watches.

Ray starts the actor anew elsewhere when its machine is lost, and it starts the process. It may know nothing of who
asked for it: whoever launched the cluster may have gone.
"""

import asyncio
import os
import re
import sys
import threading
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from engine.cluster.launching.kept_process import KeptProcess, serve_command
from engine.cluster.launching.ray_plan import Service

ActorState = Literal["starting", "ready", "restarting", "refused", "draining", "ended", "waiting", "lost"]
_READY = re.compile(r"(?:router |coordinator |scaler )?ready at (.+)")
_USAGE_ERROR = 2


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """How a member does: where it runs, its address once it has one, and the last line that it wrote.

    One that Ray has no room for, or starts anew, is `waiting`; one that Ray has given up is `lost`.
    """

    name: str
    state: ActorState
    machine: str = ""
    address: str = ""
    last_line: str = ""


class RoleActor:
    """A member's process and the thread that keeps it. Its methods return at once."""

    def __init__(self, service: Service, kind: str, at: int) -> None:
        """Start the process on this machine."""
        ray: Any = import_module("ray")  # optional, and there wherever Ray makes actors
        self._service, self._machine = service, str(ray.util.get_node_ip_address())
        part = service.part(kind, at, self._machine)
        folder = Path(service.folder)
        self._kept = KeptProcess(
            part.name,
            serve_command(part),
            os.environ,
            folder if folder.is_dir() else None,
            self._told,
        )
        self._address: tuple[int | None, str] = (None, "")
        self._last_line = ""
        self._ending = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="member", daemon=True)
        self._thread.start()

    def service(self) -> Service:
        """Return what this member was started by, for members to come."""
        return self._service

    def status(self) -> ActorStatus:
        """Tell how it does."""
        return ActorStatus(
            self._kept.name, self._state(), self._machine, self._address_now(), self._last_line
        )

    def end(self) -> None:
        """Have it drain, then end."""
        if not self._ending.is_set():
            self._ending.set()
            asyncio.run_coroutine_threadsafe(self._kept.end(self._service.drain_s), self._loop)

    def _run(self) -> None:
        self._loop.run_until_complete(self._kept.run())

    def _told(self, line: str) -> None:
        """Hand a line on to the actor's log, which Ray keeps."""
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if ready := _READY.match(line):
            self._address = (self._kept.pid, ready[1].partition(": ")[0])
        if line.strip():
            self._last_line = line

    def _address_now(self) -> str:
        pid, address = self._address
        return address if pid is not None and pid == self._kept.pid else ""

    def _state(self) -> ActorState:
        if not self._thread.is_alive():
            return "ended"
        if self._ending.is_set():
            return "draining"
        if self._address_now():
            return "ready"
        if self._kept.last_code == _USAGE_ERROR:
            return "refused"
        return "starting" if self._kept.pid is not None else "restarting"
