"""Two hosts and the router between them, made of network namespaces: a link that can be slowed, cut and healed."""

import os
import subprocess
from dataclasses import dataclass

NORTH, SOUTH = "10.77.1.2", "10.77.2.2"
WAIT_S = 30.0


class NamespacesForbidden(Exception):
    """The system does not let us make network namespaces; the message says what it answered."""


@dataclass(frozen=True)
class TwoHosts:
    """The puller lives in `north`, the source in `south`; every packet between them passes `router`."""

    north: str
    south: str
    router: str

    @classmethod
    def build(cls) -> "TwoHosts":
        """Make them; NamespacesForbidden if that is not allowed here."""
        hosts = cls(*(f"lora-{role}-{os.getpid()}" for role in ("north", "south", "router")))
        try:
            for name in (hosts.north, hosts.south, hosts.router):
                _run("ip", "netns", "add", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            hosts._wire(hosts.north, "north", "10.77.1.1", NORTH)
            hosts._wire(hosts.south, "south", "10.77.2.1", SOUTH)
            hosts.heal()
            hosts.shape("1gbit")
        except (OSError, subprocess.CalledProcessError) as error:
            hosts.tear_down()
            detail = (
                error.stderr.decode().strip()
                if isinstance(error, subprocess.CalledProcessError)
                else str(error)
            )
            raise NamespacesForbidden(f"network namespaces are not available here: {detail}") from error
        return hosts

    def launcher(self, name: str) -> tuple[str, ...]:
        """What to put before a command line to run it in `name`."""
        return ("ip", "netns", "exec", name)

    def shape(self, rate: str) -> None:
        """Let at most `rate` (of tc: "100mbit") through, either way."""
        for device in ("north", "south"):
            limits = ("rate", rate, "burst", "256kb", "latency", "100ms")
            self._in_router("tc", "qdisc", "replace", "dev", device, "root", "tbf", *limits)

    def cut(self) -> None:
        """Lose every packet, without a word to either end."""
        self._in_router("sysctl", "-qw", "net.ipv4.ip_forward=0")

    def heal(self) -> None:
        """Let packets through again."""
        self._in_router("sysctl", "-qw", "net.ipv4.ip_forward=1")

    def tear_down(self) -> None:
        """Remove the namespaces, and with them everything in them."""
        for name in (self.north, self.south, self.router):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=WAIT_S, check=False)

    def _wire(self, host: str, device: str, gateway: str, address: str) -> None:
        _run(
            "ip",
            "link",
            "add",
            "up0",
            "netns",
            host,
            "type",
            "veth",
            "peer",
            "name",
            device,
            "netns",
            self.router,
        )
        _run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "up0")
        _run("ip", "-n", host, "link", "set", "up0", "up")
        _run("ip", "-n", self.router, "addr", "add", f"{gateway}/24", "dev", device)
        _run("ip", "-n", self.router, "link", "set", device, "up")
        _run("ip", "-n", host, "route", "add", "default", "via", gateway)

    def _in_router(self, *command: str) -> None:
        _run(*self.launcher(self.router), *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)
