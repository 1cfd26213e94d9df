"""An impostor in a process of its own: it passes on what an honest source grants, but for one thing that is wrong."""

import json
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict

from msgspec import structs

from tests.transport.child import Child
from tests.transport.impostor import NODE, Forge, Impostor, damaged, elsewhere, leased, soon, with_metadata
from tests.transport.node_setup import Setup
from transport.base import Address
from transport.control.connection import Connection
from transport.control.messages import LENGTH, Bytes, Grant, Read, encode
from transport.control.security import Authenticator
from transport.errors import TransportError

Forgery = Callable[[Connection, Grant], None]


class ProcessForger:
    """Tells one puller of the memory of `source`, with the forgery of that name; start it with `launcher`."""

    def __init__(
        self,
        setup: Setup,
        source: Address,
        forgery: str,
        launcher: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        settings = {"setup": setup.as_json(), "source": asdict(source), "forgery": forgery}
        self.child = Child(main, settings, tuple(launcher), environment)
        self.address = Address(**self.child.ask("hello"))


def grants(forge: Forge) -> Forgery:
    """Another grant."""
    return lambda connection, grant: connection.send(forge(grant), soon())


def grants_a_negative_span(connection: Connection, grant: Grant) -> None:
    wrong = encode(grant)[LENGTH.size :].replace(b'"nbytes":', b'"nbytes":-')
    connection.send_bytes(memoryview(LENGTH.pack(len(wrong)) + wrong), soon())


def hangs_up_in_a_grant(connection: Connection, grant: Grant) -> None:
    connection.send_bytes(memoryview(encode(grant)[:-9]), soon())
    connection.abort()


def sends(announced: int, sent: int) -> Forgery:
    """So many bytes more are announced, and sent, than were granted; then it hangs up."""

    def forgery(connection: Connection, grant: Grant) -> None:
        nbytes = sum(region.nbytes for region in grant.regions)
        connection.send(grant, soon())
        connection.expect(Read, soon())
        connection.send(Bytes(nbytes + announced), soon())
        connection.send_bytes(memoryview(bytes(nbytes + sent)), soon())
        connection.abort()

    return forgery


def larger(grant: Grant) -> Grant:
    region = grant.regions[0]
    return structs.replace(grant, regions=(structs.replace(region, nbytes=region.nbytes + 1),))


def of_another_node(grant: Grant) -> Grant:
    return structs.replace(grant, regions=(structs.replace(grant.regions[0], node=f"not {NODE}"),))


FORGERIES: Mapping[str, Forgery] = {
    "a truncated grant": hangs_up_in_a_grant,
    "a negative span": grants_a_negative_span,
    "a larger span": grants(larger),
    "another node's memory": grants(of_another_node),
    "more bytes than granted": sends(1, 1),
    "fewer bytes than announced": sends(0, -1),
    "truncated metadata": grants(with_metadata(lambda metadata: metadata[: len(metadata) // 2])),
    "damaged metadata": grants(with_metadata(damaged)),
    "memory that is not registered": grants(elsewhere(1 << 40)),
    "memory past the end": grants(elsewhere(1 << 20)),
}


def main(control: socket.socket) -> None:
    """Lie once; end when told to."""
    with control, control.makefile("rw") as lines:
        settings = json.loads(lines.readline())
        setup, source = Setup(**settings["setup"]), Address(**settings["source"])
        connection, _, capabilities = Authenticator(setup.security(), "liar").dial(
            source.host, source.port, soon()
        )
        connection.close()

        def lie(puller: Connection) -> None:
            with leased(source, setup.security(), setup.path) as grant:
                FORGERIES[settings["forgery"]](puller, grant)
                with suppress(TransportError):
                    puller.receive(soon())

        impostor = Impostor(lie, setup.security(), {setup.path: capabilities[setup.path]}, setup.host)
        for line in lines:
            (command,) = json.loads(line)
            if command == "close":
                impostor.close()
            lines.write(json.dumps(asdict(impostor.address)) + "\n")
            lines.flush()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
