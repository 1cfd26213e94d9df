"""Hold what an operator may say of peers, and turn it into what this node demands of them: a token and certificates."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from engine.config.option import Option, check_fields, options_of
from engine.config.option_types import (
    ADDRESS,
    FILE,
    FLAG,
    READABLE_FILE,
    SECONDS,
    SECRET,
    SIZE,
    TEXT,
    one_of,
    whole_number,
)
from engine.errors import InvalidConfig
from transport.base import Address
from transport.control.security import Security, TlsFiles
from transport.errors import HelloRefused

PEER_TOKEN_VARIABLE = "LORASERVE_PEER_TOKEN"

PeerPath = Literal["auto", "ucx", "stream"]


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Nodes that share adapters: whom this one asks (`addresses`), where they reach it (`listen`), on what terms.

    Off unless one of the two is given. Peers trust each other by a token and either certificates (`tls_*`) or, on
    one machine only, `plain`. They must serve the same base model. Without `publish_bytes` copies for peers take as
    much host memory as the adapters have, at most 1 GiB.
    """

    addresses: Annotated[
        tuple[Address, ...],
        Option("peers", ADDRESS, "pull adapters that this node lacks from here", "peer", many=True),
    ] = ()
    listen: Annotated[
        Address | None,
        Option(
            "peers", ADDRESS, "let peers pull this node's adapters here", "peer-listen",
            note="with --peer alone it is a free port of this machine",
        ),
    ] = None  # fmt: skip
    token: Annotated[
        str | None,
        Option(
            "peers", SECRET, "the token that all peers share", variable=PEER_TOKEN_VARIABLE, has_flag=False
        ),
    ] = field(default=None, repr=False)
    token_file: Annotated[
        Path | None,
        Option("peers", READABLE_FILE, "file that holds the token that all peers share", "peer-token-file"),
    ] = None
    plain: Annotated[
        bool, Option("peers", FLAG, "no encryption: peers on this machine only", "peer-plain")
    ] = False
    tls_authority: Annotated[
        Path | None, Option("peers", FILE, "PEM: who signs the peers' certificates", "peer-tls-ca")
    ] = None
    tls_cert: Annotated[
        Path | None, Option("peers", FILE, "PEM: this node's certificate", "peer-tls-cert")
    ] = None
    tls_key: Annotated[Path | None, Option("peers", FILE, "PEM: its key", "peer-tls-key")] = None
    tls_name: Annotated[
        str | None,
        Option("peers", TEXT, "what peers' certificates must say; none: their host", "peer-tls-name"),
    ] = None
    path: Annotated[
        PeerPath,
        Option("peers", one_of(PeerPath, "PATH"), "how bytes travel", "peer-path", former="peer-door"),
    ] = "auto"
    bandwidth_bytes_per_s: Annotated[
        int | None, Option("peers", SIZE, "bytes per second to pull per peer, on average", "peer-bandwidth")
    ] = None
    pulls: Annotated[
        int, Option("peers", whole_number("N", 1, 4), "pulls at once per peer, 1 to 4", "peer-pulls")
    ] = 2
    publish_bytes: Annotated[
        int | None,
        Option(
            "peers", SIZE, "host memory for copies of adapters that peers may pull though they are not resident",
            "peer-publish-bytes", former="peer-lend-bytes",
        ),
    ] = None  # fmt: skip
    refresh_s: Annotated[
        float,
        Option(
            "peers", SECONDS, "how often names learnt from peers are asked for again", "peer-refresh-s",
            former="peer-review-s",
        ),
    ] = 5.0  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        if self.enabled:
            trust(self)
            return
        for option in options_of(PeerConfig):
            value = getattr(self, option.field)
            if value != option.default:
                remedy = "it does nothing without peers: give --peer or --peer-listen too, or leave it out"
                raise InvalidConfig(option.key, option.shown(value), remedy)

    @property
    def enabled(self) -> bool:
        """Tell whether this node has anything to do with peers."""
        return bool(self.addresses) or self.listen is not None


def trust(config: PeerConfig) -> Security:
    """Return what this node demands of its peers.

    Raises InvalidConfig: no token or a short one, TLS files that are not all there, or an address beyond this
    machine without them.
    """
    origin = str(config.token_file) if config.token_file else "(hidden)"
    try:
        security = Security(_token(config), _tls_files(config))
    except ValueError as error:
        field = "peer_token_file" if config.token_file else PEER_TOKEN_VARIABLE
        raise InvalidConfig(field, origin, str(error)) from error
    listen = () if config.listen is None else (("peer_listen", config.listen),)
    for option, address in (*listen, *(("peer", peer) for peer in config.addresses)):
        try:
            security.check_host(address.host)
        except HelloRefused as error:
            flags = "--peer-tls-ca, --peer-tls-cert, --peer-tls-key"
            raise InvalidConfig(option, str(address), f"{error} ({flags})") from error
    return security


def _token(config: PeerConfig) -> str:
    """Return the peers' token, from its file if there is one. Raises ValueError for one that no header may carry."""
    if config.token_file is not None:
        token = config.token_file.read_text(encoding="utf-8", errors="replace").strip()
        SECRET.check(token)
        return token
    if config.token is None:
        remedy = f"name a file that holds the cluster's token, or set {PEER_TOKEN_VARIABLE}"
        raise InvalidConfig("peer_token_file", None, remedy)
    return config.token


def _tls_files(config: PeerConfig) -> TlsFiles | None:
    """Return the TLS files, all of which can be read; None where plain TCP was chosen. Raises InvalidConfig."""
    authority, certificate, key = config.tls_authority, config.tls_cert, config.tls_key
    files = {"peer_tls_ca": authority, "peer_tls_cert": certificate, "peer_tls_key": key}
    for option, file in files.items():
        if file is not None:
            _check_readable(option, file)
    if authority and certificate and key:
        return TlsFiles(authority, certificate, key, config.tls_name)
    if any(files.values()):
        missing = next(option for option, file in files.items() if file is None)
        raise InvalidConfig(
            missing, None, "give all of --peer-tls-ca, --peer-tls-cert and --peer-tls-key, or none"
        )
    if not config.plain:
        remedy = "give certificates, or --peer-plain if all peers are on this machine"
        raise InvalidConfig("peer_tls_cert", None, remedy)
    return None


def _check_readable(option: str, file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        remedy = f"it cannot be read ({error.strerror}): give a PEM file (scripts/certificates.py makes them)"
        raise InvalidConfig(option, str(file), remedy) from error
