"""A puller in a process of its own, so that it can live in a network namespace, be frozen and be killed."""

from collections.abc import Mapping
from dataclasses import dataclass

from tests.transport.child import ANSWER_S, Child
from tests.transport.node_setup import Setup
from tests.transport.puller_process import main
from transport.base import Address, TransportUsage


@dataclass(frozen=True)
class Outcome:
    """How a pull ended."""

    error: str | None
    took_s: float


class ProcessPuller:
    """Pulls to the start of its memory, one name at a time."""

    def __init__(
        self, setup: Setup, launcher: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.child = Child(main, setup.as_json(), launcher, environment or {})

    def begin(self, peer: Address, name: str, nbytes: int, timeout_s: float) -> None:
        self.child.ask("begin", peer.host, peer.port, name, nbytes, timeout_s)

    def pull(self, peer: Address, name: str, nbytes: int, timeout_s: float = 60.0) -> Outcome:
        self.begin(peer, name, nbytes, timeout_s)
        return self.result()

    def first_byte(self, timeout_s: float) -> bool:
        return self.child.ask("first_byte", timeout_s)

    def result(self) -> Outcome:
        return Outcome(**self.child.ask("result", ANSWER_S / 2))

    def settled(self, timeout_s: float) -> bool:
        return self.child.ask("settled", timeout_s)

    def exact(self, offset: int, nbytes: int) -> bool:
        return self.child.ask("exact", offset, nbytes)

    def reuse(self) -> None:
        self.child.ask("reuse")

    def untouched(self) -> bool:
        return self.child.ask("untouched")

    def usage(self) -> TransportUsage:
        return TransportUsage(**self.child.ask("usage"))
