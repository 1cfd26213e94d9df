"""Give each member of a cluster a network namespace on a bridge, and cut or slow the links between them.

It needs root and the `ip` and `tc` programs of iproute2. A cut drops packets without a word: nobody is told by a
closed connection. Delay by itself needs a kernel with netem, which many lack; so a slow link is one of few bits.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

_NOBODY = "02:00:00:00:00:00"  # a hardware address that no member has: what goes there is lost
_SLOW = ("rate", "400kbit", "burst", "16kb", "latency", "2s")


class NetworkRefused(Exception):
    """Namespaces, or what connects them, cannot be had here; the message says what was refused."""


@dataclass(slots=True)
class Network:
    """A bridge with a namespace for each of `names`. To be closed."""

    names: Sequence[str]
    _indices: dict[str, int] = field(init=False)
    _tag: str = field(init=False)
    _prefix: str = field(init=False)

    def __post_init__(self) -> None:
        self._indices = {name: at for at, name in enumerate(self.names)}
        self._tag = f"ch{os.getpid() % 100_000}"
        self._prefix = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"

    @property
    def hosts(self) -> dict[str, str]:
        """Return each member's address."""
        return {name: f"{self._prefix}.{10 + at}" for name, at in self._indices.items()}

    def open(self) -> None:
        """Make bridge and namespaces. Raises NetworkRefused, and leaves nothing then."""
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self._prefix}.1/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for name, host in self.hosts.items():
                space, port = self._space(name), self._port(name)
                _ip("netns", "add", space)
                _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("link", "set", port, "master", self._bridge, "up")
                _ip("-n", space, "addr", "add", f"{host}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "lo", "up")
                _ip("-n", space, "link", "set", "eth0", "up")
        except NetworkRefused:
            self.close()
            raise

    def close(self) -> None:
        """Remove all that was made."""
        for name in self.names:
            _try("ip", "link", "del", self._port(name))
            _try("ip", "netns", "del", self._space(name))
        _try("ip", "link", "del", self._bridge)

    def inside(self, name: str) -> tuple[str, ...]:
        """Return what is to stand before a command, so that it runs in that member's namespace."""
        return ("ip", "netns", "exec", self._space(name))

    def cut(self, name: str) -> None:
        """Take a member's cable out: nothing reaches it, and it reaches nobody."""
        _ip("link", "set", self._port(name), "nomaster")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        _ip("link", "set", self._port(name), "master", self._bridge)

    def part(self, one: str, other: str) -> None:
        """Let nothing through between two members; both reach everybody else."""
        for here, there in ((one, other), (other, one)):
            _ip("-n", self._space(here), "neigh", "replace", self.hosts[there], "lladdr", _NOBODY,
                "nud", "permanent", "dev", "eth0")  # fmt: skip

    def join(self, one: str, other: str) -> None:
        """Let two members reach each other again."""
        for here, there in ((one, other), (other, one)):
            _ip("-n", self._space(here), "neigh", "del", self.hosts[there], "dev", "eth0")

    def slow(self, name: str) -> None:
        """Bound what goes to a member and what comes from it."""
        _run("tc", "qdisc", "replace", "dev", self._port(name), "root", "tbf", *_SLOW)
        _run("tc", "-n", self._space(name), "qdisc", "replace", "dev", "eth0", "root", "tbf", *_SLOW)

    def hasten(self, name: str) -> None:
        """Bound it no more."""
        _run("tc", "qdisc", "del", "dev", self._port(name), "root")
        _run("tc", "-n", self._space(name), "qdisc", "del", "dev", "eth0", "root")

    @property
    def _bridge(self) -> str:
        return f"{self._tag}br"

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _port(self, name: str) -> str:
        return f"{self._tag}p{self._indices[name]}"


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except FileNotFoundError as error:
        raise NetworkRefused(f"{command[0]!r} is not installed (iproute2)") from error
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise NetworkRefused(f"{' '.join(command)}: {reason}") from error


def _try(*command: str) -> None:
    """Remove something that may not be there."""
    try:
        _run(*command)
    except NetworkRefused:
        return
