"""Hold what an operator may say of an HTTP server's clients: their keys, what needs none, browsers' origins and TLS."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated

from engine.config.option import Option, check_fields
from engine.config.option_types import FLAG, KEYS, ORIGINS, READABLE_FILE
from engine.errors import InvalidConfig
from engine.tenants.tenant import key_digest

API_KEY_VARIABLE = "LORASERVE_API_KEY"
ADMIN_KEY_VARIABLE = "LORASERVE_ADMIN_KEY"


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may ask, who may administer, and from which web pages.

    An API key asks. An admin key also loads and unloads adapters. Each kind may be given as texts and in a file,
    one key a line; all of them count. Without an API key everybody may ask.
    """

    _: KW_ONLY
    api_keys: Annotated[
        tuple[str, ...],
        Option(
            "access", KEYS, "what clients send to ask", "api-key", many=True, variable=API_KEY_VARIABLE,
            note="several by commas; safer in its environment variable or in a file",
        ),
    ] = field(default=(), repr=False)  # fmt: skip
    api_key_file: Annotated[
        Path | None, Option("access", READABLE_FILE, "file of API keys, one a line")
    ] = None  # fmt: skip
    admin_keys: Annotated[
        tuple[str, ...],
        Option(
            "access", KEYS, "what clients send to load and unload adapters", "admin-key", many=True,
            variable=ADMIN_KEY_VARIABLE,
            note="it may ask too; none: clients on this machine may, if the server listens at a loopback address",
        ),
    ] = field(default=(), repr=False)  # fmt: skip
    admin_key_file: Annotated[
        Path | None, Option("access", READABLE_FILE, "file of admin keys, one a line")
    ] = None
    allow_admin_without_key: Annotated[
        bool, Option("access", FLAG, "let everybody who may ask load and unload adapters")
    ] = False
    allow_metrics_without_key: Annotated[
        bool, Option("access", FLAG, "answer /metrics without a key though there are API keys")
    ] = False
    cors_origins: Annotated[
        tuple[str, ...],
        Option("access", ORIGINS, "origins whose web pages may talk to the server; * for all", many=True),
    ] = ()
    tls_cert: Annotated[
        Path | None, Option("access", READABLE_FILE, "PEM: the certificate that HTTPS is served with")
    ] = None
    tls_key: Annotated[Path | None, Option("access", READABLE_FILE, "PEM: its key")] = None

    def __post_init__(self) -> None:
        check_fields(self)
        asking, administering = self.read_api_keys(), self.read_admin_keys()
        if set(asking) & set(administering):
            raise InvalidConfig("admin_key", "(hidden)", "it is an API key too: give keys of one kind only")
        if administering and self.allow_admin_without_key:
            raise InvalidConfig(
                "allow_admin_without_key", True, "there is an admin key: leave one of them out"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_cert" if self.tls_cert is None else "tls_key"
            raise InvalidConfig(missing, None, "give both --tls-cert and --tls-key, or neither")

    def read_api_keys(self) -> tuple[str, ...]:
        """Return every API key, those in the file included. Raises InvalidConfig."""
        return (*self.api_keys, *_keys_of("api_key_file", self.api_key_file))

    def read_admin_keys(self) -> tuple[str, ...]:
        """Return every admin key, those in the file included. Raises InvalidConfig."""
        return (*self.admin_keys, *_keys_of("admin_key_file", self.admin_key_file))


def key_name(key: str) -> str:
    """Return what logs and tenants' weights call a key: enough to tell it from others, too little to use it."""
    return key_digest(key)[:8]


def _keys_of(option: str, file: Path | None) -> Sequence[str]:
    """Return a file's keys. A file without one is refused: nobody means to serve everybody by it."""
    if file is None:
        return ()
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
        keys = [line for line in lines if line]
        for key in keys:
            KEYS.check(key)
    except (OSError, ValueError) as error:
        raise InvalidConfig(option, str(file), f"it cannot be used ({error}): write one key a line") from None
    if not keys:
        raise InvalidConfig(option, str(file), "it holds no key: write one a line")
    return keys
