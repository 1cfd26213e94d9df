"""Hold what an operator may choose of HTTP: how long a client may take, and how much all of them may hold."""

from dataclasses import dataclass
from typing import Annotated

from engine.config.option import Option, check_fields
from engine.config.option_types import AMOUNT, COUNT, SECONDS, SIZE
from engine.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Bounds of connections. What exceeds one costs its own connection, and no other."""

    max_connections: Annotated[
        int | None,
        Option(
            "connections",
            COUNT,
            "connections that may be open; more are told 503",
            note="none: 1024, or what the process's limit of open files allows",
        ),
    ] = None
    max_body_bytes: Annotated[
        int, Option("connections", SIZE, "most bytes of a request's body, as sent and decompressed")
    ] = 4 << 20
    max_bodies_bytes: Annotated[
        int, Option("connections", SIZE, "most bytes of all bodies that are being read; beyond is 503")
    ] = 64 << 20
    header_timeout_s: Annotated[
        float, Option("connections", SECONDS, "how long a request's headers may take")
    ] = 20.0
    body_timeout_s: Annotated[
        float, Option("connections", SECONDS, "how long a request's body may take")
    ] = 60.0  # fmt: skip
    idle_timeout_s: Annotated[
        float, Option("connections", SECONDS, "how long a connection may lie idle between requests")
    ] = 75.0
    write_timeout_s: Annotated[
        float, Option("connections", SECONDS, "how long a client may take nothing of what was written")
    ] = 30.0
    page_watchers: Annotated[
        int, Option("connections", AMOUNT, "clients that may watch the live page at once; more are told 503",
                    note="0: no page")
    ] = 16  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("header_timeout_s", "body_timeout_s", "idle_timeout_s", "write_timeout_s"):
            if getattr(self, name) == 0:
                raise InvalidConfig(name, 0, "nothing comes in no time: give more than 0")
        if self.max_bodies_bytes < self.max_body_bytes:
            remedy = f"one body may have {self.max_body_bytes} bytes (max_body_bytes): give at least as many"
            raise InvalidConfig("max_bodies_bytes", self.max_bodies_bytes, remedy)
