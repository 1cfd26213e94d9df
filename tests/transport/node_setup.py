"""How a node of the tests is set up, in whichever process."""

from dataclasses import asdict, dataclass
from pathlib import Path

from transport.base import Address
from transport.control.security import Security, TlsFiles
from transport.network import NetworkOptions, NetworkTransport
from transport.paths.base import AUTO
from transport.paths.choice import open_paths

TOKEN = "a token of the tests"
MIB = 1 << 20


@dataclass(frozen=True)
class Setup:
    """Plain values, so that they can be sent to a child; `tls` is authority, certificate and key, or nothing."""

    arena_bytes: int = 65 * MIB
    tls: tuple[str, ...] = ()
    ucx: bool = False
    open_network: bool = False
    path: str = AUTO
    host: str = "127.0.0.1"
    port: int = 0
    token: str = TOKEN
    most_hold_s: float = 60.0

    def as_json(self) -> dict[str, object]:
        """For `Setup(**json)` at the other end."""
        return asdict(self)

    def security(self) -> Security:
        """What it demands of its peers."""
        tls = TlsFiles(Path(self.tls[0]), Path(self.tls[1]), Path(self.tls[2])) if self.tls else None
        return Security(self.token, tls, self.open_network)

    def open(self, name: str) -> NetworkTransport:
        """A transport set up like this."""
        paths = open_paths(name, AUTO if self.ucx else "stream", self.open_network)
        options = NetworkOptions(self.security(), Address(self.host, self.port), self.path, self.most_hold_s)
        return NetworkTransport(name, options, paths)
