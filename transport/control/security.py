"""Decide who may talk to whom: by certificates for the connection and a shared token for the cluster.

Plain TCP stays on loopback. The token never travels: each end proves that it has it by an HMAC (RFC 2104) over both
nonces and both names. The source does so first, so that neither sends anything of value to a stranger.
"""

import hmac
import ipaddress
import secrets
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from transport.control.connection import Connection, Deadline, reason
from transport.control.messages import (
    MOST_STRANGER_BYTES,
    VERSION,
    Challenge,
    Hello,
    Proof,
    Welcome,
    refusal_of,
)
from transport.errors import HelloRefused, PeerGone, PullTimeout, TransportError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the authority that signs the cluster's certificates, this node's certificate and its key.

    `peer_name` is the name that peers' certificates must bear; None means the host that is dialled.
    """

    authority: Path
    certificate: Path
    key: Path
    peer_name: str | None = None


@dataclass(frozen=True, slots=True)
class Security:
    """What a node demands of its peers. Without `tls` only loopback is used, unless `plain_network` is chosen."""

    token: str = field(repr=False)
    tls: TlsFiles | None = None
    plain_network: bool = False

    def __post_init__(self) -> None:
        if len(self.token) < 16:
            raise ValueError(f"token: {len(self.token)} characters; give at least 16, the same at every node")

    def check_host(self, host: str) -> None:
        """Raise HelloRefused if bytes would travel in the clear beyond this machine."""
        if self.tls is None and not self.plain_network and not is_loopback(host):
            raise HelloRefused(f"{host}: plain TCP stays on this machine; give TLS files")


class Authenticator:
    """Turns sockets into trusted connections, at either end."""

    def __init__(self, security: Security, node: str) -> None:
        self._security = security
        self._token = security.token.encode()
        self._node = node
        self._dialling = self._context(ssl.PROTOCOL_TLS_CLIENT)
        self._accepting = self._context(ssl.PROTOCOL_TLS_SERVER)

    def dial(self, host: str, port: int, deadline: Deadline) -> tuple[Connection, str, dict[str, str]]:
        """Connect to a source: the trusted connection, its node, and the capabilities of each path that it offers.

        Raises HelloRefused, PeerGone, PullTimeout.
        """
        self._security.check_host(host)
        where = f"{host}:{port}"
        try:
            sock = socket.create_connection((host, port), deadline.left_s())
        except TimeoutError as error:
            raise PullTimeout(f"{where}: no answer in time; use another source or allow more") from error
        except OSError as error:
            raise PeerGone(f"{where}: {reason(error)}; use another source") from error
        name = self._security.tls.peer_name if self._security.tls else None
        connection = self._wrap(sock, self._dialling, where, deadline, name or host)
        try:
            node, capabilities = self._introduce(connection, deadline)
        except TransportError:
            connection.close()
            raise
        return connection, node, capabilities

    def accept(self, sock: socket.socket, where: str, deadline: Deadline) -> Connection:
        """Return a connection to whoever connected, encrypted if this node has certificates.

        Raises HelloRefused, PeerGone, PullTimeout.
        """
        return self._wrap(sock, self._accepting, where, deadline, None)

    def welcome(self, connection: Connection, capabilities: dict[str, str], deadline: Deadline) -> str:
        """Let a puller in, or refuse it, and return its node. Raises HelloRefused, WireError, PeerGone, PullTimeout."""
        hello = connection.expect(Hello, deadline, MOST_STRANGER_BYTES)
        if hello.version != VERSION:
            raise HelloRefused(
                f"version {hello.version} meets {VERSION} at {self._node}: update the older node"
            )
        nonce = secrets.token_hex(16)
        connection.send(
            Challenge(VERSION, self._node, nonce, self._prove("source", hello, nonce, self._node)), deadline
        )
        proof = connection.expect(Proof, deadline, MOST_STRANGER_BYTES).proof
        if not _same(proof, self._prove("puller", hello, nonce, self._node)):
            raise HelloRefused(f"{connection.peer}: wrong token; give every node of the cluster the same")
        connection.send(Welcome(capabilities), deadline)
        return hello.node

    def _introduce(self, connection: Connection, deadline: Deadline) -> tuple[str, dict[str, str]]:
        hello = Hello(VERSION, self._node, secrets.token_hex(16))
        try:
            connection.send(hello, deadline)
            answer = connection.expect(Challenge, deadline, MOST_STRANGER_BYTES)
        except PeerGone as gone:
            # TLS 1.3 tells a client only now that its certificate was not accepted.
            if isinstance(gone.__cause__, ssl.SSLError):
                raise HelloRefused(f"{gone}: {_tls_remedy(gone.__cause__)}") from gone
            raise
        if not _same(answer.proof, self._prove("source", hello, answer.nonce, answer.node)):
            refusal = HelloRefused(f"{connection.peer}: wrong token; give every node of the cluster the same")
            with suppress(TransportError):  # it need not listen
                connection.send(refusal_of(refusal), deadline)
            raise refusal
        connection.send(Proof(self._prove("puller", hello, answer.nonce, answer.node)), deadline)
        return answer.node, connection.expect(Welcome, deadline).capabilities

    def _prove(self, role: str, hello: Hello, nonce: str, source: str) -> str:
        said = "\n".join((role, str(VERSION), hello.nonce, nonce, hello.node, source))
        return hmac.digest(self._token, said.encode(), "sha256").hex()

    def _wrap(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None,
        where: str,
        deadline: Deadline,
        name: str | None,
    ) -> Connection:
        try:
            sock.settimeout(deadline.left_s())
            if context is not None:
                sock = context.wrap_socket(sock, server_side=name is None, server_hostname=name)
            return Connection(sock, where)
        except ssl.SSLError as error:
            sock.close()
            raise HelloRefused(f"{where}: {reason(error)}; {_tls_remedy(error)}") from error
        except TimeoutError as error:
            sock.close()
            raise PullTimeout(f"{where}: no answer in time; use another source or allow more") from error
        except OSError as error:
            sock.close()
            raise PeerGone(f"{where}: {reason(error)} before it said anything; use another source") from error

    def _context(self, side: int) -> ssl.SSLContext | None:
        files = self._security.tls
        if files is None:
            return None
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(files.authority)
        context.load_cert_chain(files.certificate, files.key)
        return context


def is_loopback(host: str) -> bool:
    """Tell if `host` never leaves this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tls_remedy(error: ssl.SSLError) -> str:
    if error.reason == "WRONG_VERSION_NUMBER":  # what it said first was no TLS
        return "the other end may speak plain TCP: give both TLS files"
    return "compare the certificates of both ends"


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
