"""Make an authority for a cluster's transport and certificates for its nodes, with the `openssl` program.

    python -m scripts.certificates FOLDER HOST...    # authority.pem and its key, once; node.pem and its key, every time

Keep `authority.key` off the nodes. Each node needs authority.pem and a node.pem and node.key that name its
own hosts.
"""

import argparse
import ipaddress
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE_ERROR = 2
DAYS = 365
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", str(DAYS))
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", re.IGNORECASE | re.ASCII)
"""A host's name (RFC 1123, and underscores, as container networks give); `*.` in front stands for one label."""


class CertificatesFailed(Exception):
    """No certificates were made; the message says what stood in the way, and the remedy."""


def make_certificates(folder: Path, hosts: Sequence[str]) -> tuple[str, ...]:
    """Paths of authority, certificate and key in `folder`; the authority is kept if it is there.

    Raises CertificatesFailed."""
    names = "subjectAltName=" + ",".join(map(_alternative_name, hosts))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CertificatesFailed(f"folder {str(folder)!r}: {error.strerror}; give one to write to") from error
    authority, authority_key = folder / "authority.pem", folder / "authority.key"
    certificate, key = folder / "node.pem", folder / "node.key"
    if not authority.exists():
        subject = ("-subj", "/CN=transport authority")
        _openssl("req", "-x509", *NEW_KEY, "-keyout", authority_key, "-out", authority, *subject)
    signed = (
        "-CA",
        authority,
        "-CAkey",
        authority_key,
        "-addext",
        names,
        "-addext",
        "basicConstraints=CA:FALSE",
    )
    _openssl("req", "-x509", *NEW_KEY, "-keyout", key, "-out", certificate, "-subj", "/CN=node", *signed)
    return str(authority), str(certificate), str(key)


def _alternative_name(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        if not _NAME.fullmatch(host):
            raise CertificatesFailed(
                f"host {host!r} is no name and no address: give it as peers dial it, without a port"
            ) from None
        return f"DNS:{host}"


def _openssl(*arguments: str | Path) -> None:
    try:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise CertificatesFailed("the openssl program is not on the PATH: install it") from error
    except subprocess.CalledProcessError as error:
        reason = next(iter(error.stderr.splitlines()), f"exit code {error.returncode}")
        raise CertificatesFailed(f"openssl failed: {reason}") from error


def main(arguments: Sequence[str]) -> int:
    """Parse, make, say where; the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.certificates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Certificates, the authority's too, are valid for {DAYS} days from now.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="where the files are written, made if it is not there; its authority is kept",
    )
    parser.add_argument(
        "hosts",
        nargs="+",
        metavar="HOST",
        help="name or IP address by which peers dial the node, without a port",
    )
    asked = parser.parse_args(arguments)
    try:
        print(*make_certificates(asked.folder, asked.hosts), sep="\n")
    except CertificatesFailed as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
