"""Make an authority for a cluster's transport and certificates for its nodes, with the `openssl` program.

    python -m scripts.certificates FOLDER HOST...    # authority.pem and its key, once; node.pem and its key, every time

Keep `authority.key` off the nodes. Each node needs authority.pem and a node.pem and node.key that name its own hosts.
"""

import argparse
import ipaddress
import subprocess
from collections.abc import Sequence
from pathlib import Path

DAYS = 365
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", str(DAYS))


def make_certificates(folder: Path, hosts: Sequence[str]) -> tuple[str, ...]:
    """Paths of authority, certificate and key in `folder`; the authority is kept if it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, authority_key = folder / "authority.pem", folder / "authority.key"
    certificate, key = folder / "node.pem", folder / "node.key"
    if not authority.exists():
        subject = ("-subj", "/CN=transport authority")
        _openssl("req", "-x509", *NEW_KEY, "-keyout", authority_key, "-out", authority, *subject)
    names = "subjectAltName=" + ",".join(map(_alternative_name, hosts))
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
        return f"DNS:{host}"


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


def main() -> None:
    """Parse, make, say where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("hosts", nargs="+", metavar="HOST")
    arguments = parser.parse_args()
    print(*make_certificates(arguments.folder, arguments.hosts), sep="\n")


if __name__ == "__main__":
    main()
