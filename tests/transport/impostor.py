"""An impostor: a source that does everything right up to the lease, and then lies."""

import base64
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

from msgspec import structs

from tests.transport.node_setup import TOKEN
from transport.base import Address
from transport.control.connection import Connection, Deadline
from transport.control.messages import Grant, LeaseRequest
from transport.control.security import Authenticator, Security
from transport.errors import TransportError

SOON_S = 30.0
NODE, TICKET = "impostor", 7

Lie = Callable[[Connection], None]
Forge = Callable[[Grant], Grant]


def soon() -> Deadline:
    return Deadline.after(SOON_S)


class Impostor:
    """Lets one puller in, hears what it asks for, and answers with `lie`."""

    def __init__(
        self,
        lie: Lie,
        security: Security | None = None,
        capabilities: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self._lie = lie
        self._capabilities = dict(capabilities or {"stream": ""})
        self._authenticator = Authenticator(security or Security(TOKEN), NODE)
        self._listener = socket.create_server((host, 0))
        self.address = Address(*self._listener.getsockname())
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Wait until the puller has gone."""
        self._thread.join(SOON_S)
        self._listener.close()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        connection = self._authenticator.accept(sock, "the puller", soon())
        try:
            self._authenticator.welcome(connection, self._capabilities, soon())
            connection.expect(LeaseRequest, soon())
            self._lie(connection)
        except TransportError:
            pass  # the puller has seen through it
        finally:
            connection.close()


@contextmanager
def leased(source: Address, security: Security, path: str) -> Generator[Grant]:
    """A lease of "adapter" at a real source, in words that the impostor may use: its own node and ticket."""
    theirs, _, _ = Authenticator(security, "liar").dial(source.host, source.port, soon())
    theirs.send(LeaseRequest("adapter", SOON_S, path), soon())
    grant = theirs.expect(Grant, soon())
    mine = tuple(structs.replace(one, node=NODE, key=TICKET) for one in grant.regions)
    try:
        yield structs.replace(grant, ticket=TICKET, regions=mine)
    finally:
        theirs.abort()
        theirs.close()


def elsewhere(offset: int) -> Forge:
    """The memory lies `offset` bytes further on."""
    return lambda grant: structs.replace(
        grant, regions=(structs.replace(grant.regions[0], address=grant.regions[0].address + offset),)
    )


def with_metadata(forge: Callable[[str], str]) -> Forge:
    """Give other metadata of the path."""
    return lambda grant: structs.replace(grant, metadata=forge(grant.metadata))


def damaged(text: str) -> str:
    """One bit is wrong in the middle of the metadata."""
    host, digest, encoded = text.split("\n")
    metadata = bytearray(base64.b64decode(encoded))
    metadata[len(metadata) // 2] ^= 1
    return "\n".join((host, digest, base64.b64encode(metadata).decode()))
