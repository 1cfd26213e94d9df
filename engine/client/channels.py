"""Choose how a client reaches a server: its address, its key, and whom it trusts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from engine.client.calls import CallFailed

_grpc = cast(Any, grpc)
_MOST_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is, as `HOST:PORT`. With `authority`, a file of certificates, or `tls` it is asked by TLS.

    `tls` alone trusts whom gRPC trusts by itself.
    """

    target: str
    key: str | None = None
    tls: bool = False
    authority: str | Path | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries."""
        return () if self.key is None else (("authorization", f"Bearer {self.key}"),)

    def channel(self) -> Any:
        """Open a channel whose calls wait."""
        return self._opened(_grpc)

    def aio_channel(self) -> Any:
        """Open a channel for asyncio."""
        return self._opened(_grpc.aio)

    def _opened(self, kind: Any) -> Any:
        options = [("grpc.max_receive_message_length", _MOST_ANSWER_BYTES)]
        if not (self.tls or self.authority is not None):
            return kind.insecure_channel(self.target, options=options)
        trusted = None if self.authority is None else Path(self.authority).read_bytes()
        return kind.secure_channel(self.target, _grpc.ssl_channel_credentials(trusted), options=options)


def failure_of(error: Any) -> CallFailed:
    """Express how a call ended, with what the server told beside."""
    told = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    retry = told.get("retry-after")
    retry_s = None if retry is None else float(retry)
    return CallFailed(error.code().name, error.details() or "", retry_s, told.get("x-request-id"))
