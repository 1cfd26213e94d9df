"""Turn a node's peer options into what it demands of its peers: a token, and certificates or plain TCP."""

from pathlib import Path

from engine.config.config import PEER_TOKEN_VARIABLE, PeerConfig
from engine.errors import InvalidConfig
from transport.control.security import Security, TlsFiles
from transport.errors import HelloRefused


def trust(config: PeerConfig) -> Security:
    """What this node demands of its peers. Nothing is opened for long, so an operator can be told at once.

    Raises InvalidConfig: no token or a short one, TLS files that are not all there, or an address beyond this
    machine without them."""
    if config.token is None:
        remedy = f"name a file that holds the cluster's token, or set {PEER_TOKEN_VARIABLE}"
        raise InvalidConfig("peer_token_file", None, remedy)
    try:
        security = Security(config.token, _tls_files(config))
    except ValueError as error:
        if config.token_file is None:
            raise InvalidConfig(PEER_TOKEN_VARIABLE, "(hidden)", str(error)) from error
        raise InvalidConfig("peer_token_file", str(config.token_file), str(error)) from error
    listen = () if config.listen is None else (("peer_listen", config.listen),)
    for option, address in (*listen, *(("peer", peer) for peer in config.peers)):
        try:
            security.check_host(address.host)
        except HelloRefused as error:
            flags = "--peer-tls-ca, --peer-tls-cert, --peer-tls-key"
            raise InvalidConfig(option, str(address), f"{error} ({flags})") from error
    return security


def _tls_files(config: PeerConfig) -> TlsFiles | None:
    """The TLS files, all of which can be read; None where plain TCP was chosen. Raises InvalidConfig."""
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
