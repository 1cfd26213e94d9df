"""A certificate authority for one test run, and a node certificate that it signed. Nothing of it is kept."""

import subprocess
from pathlib import Path

HOSTS = "subjectAltName=IP:127.0.0.1,IP:10.77.1.2,IP:10.77.2.2"
CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


def make_certificates(folder: Path) -> tuple[str, ...]:
    """Authority, certificate and key as PEM files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, authority_key = folder / "authority.pem", folder / "authority.key"
    certificate, key = folder / "node.pem", folder / "node.key"
    _openssl(
        "req", "-x509", *CURVE, "-keyout", authority_key, "-out", authority, "-subj", "/CN=test authority"
    )
    signed = (
        "-CA",
        authority,
        "-CAkey",
        authority_key,
        "-addext",
        HOSTS,
        "-addext",
        "basicConstraints=CA:FALSE",
    )
    _openssl("req", "-x509", *CURVE, "-keyout", key, "-out", certificate, "-subj", "/CN=node", *signed)
    return str(authority), str(certificate), str(key)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
