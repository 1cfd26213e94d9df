"""Listen for connections, within the process's limit of open files."""

import asyncio
import logging
import resource
import ssl
from typing import Any

from aiohttp import web

from engine.api.server.connection import ConnectionLimit, HttpConnection
from engine.api.server.rate_limited_log import RateLimitedLog
from engine.config.access_config import AccessConfig
from engine.config.http_config import HttpConfig
from engine.errors import InvalidConfig

_SHUTDOWN_S = 5.0  # for clients to take the rest of their responses when the server stops
_CONNECTIONS = 1024
_OTHER_FILES = 128  # adapters, peers, libraries
_LEAST_CONNECTIONS = 16
_log = logging.getLogger(__name__)


class HttpServer:
    """An application on a socket. A handler is cancelled when its client leaves."""

    def __init__(
        self, app: web.Application, tls: ssl.SSLContext | None = None, config: HttpConfig | None = None
    ) -> None:
        """Listen nowhere yet; with `tls` serve HTTPS, else HTTP."""
        self._tls = tls
        self._config = config or HttpConfig()
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        self._listening: asyncio.Server | None = None
        self._faults = RateLimitedLog(_log, logging.WARNING)

    async def listen(self, host: str, port: int) -> str:
        """Listen at a host and port (0 for any that is free) and return the URL.

        Raises OSError; InvalidConfig if the process may not have as many connections as were asked for.
        """
        limit = ConnectionLimit(most_connections(self._config.max_connections))
        await self._runner.setup()
        server = self._runner.server
        assert server is not None, "setup makes it"
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_fault)
        self._listening = await loop.create_server(
            lambda: HttpConnection(server, self._config, limit),
            host,
            port,
            ssl=self._tls,
            ssl_handshake_timeout=self._config.header_timeout_s if self._tls else None,
        )
        bound, number = self._listening.sockets[0].getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://[{bound}]:{number}" if ":" in bound else f"{scheme}://{bound}:{number}"

    async def stop_listening(self) -> None:
        """Accept no more connections; those that there are go on."""
        if self._listening is not None:
            self._listening.close()

    async def close(self) -> None:
        """Close every connection, after a while for clients to take the rest of their responses."""
        await self.stop_listening()
        await self._runner.cleanup()

    def _on_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Keep what asyncio says of a process without free files from filling the log."""
        error = context.get("exception")
        if isinstance(error, OSError) and "accept" in str(context.get("message")):
            self._faults.line(
                f"no connection can be accepted ({error.strerror}): raise the limit of open files"
            )
        else:
            loop.default_exception_handler(context)


def most_connections(asked: int | None, usual: int = _CONNECTIONS) -> int:
    """Return how many connections may be open, and raise the process's limit of open files for them as far as need be.

    Raises InvalidConfig if `asked` is more than the process may have.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = asked or usual
    if soft != resource.RLIM_INFINITY and soft < wanted + _OTHER_FILES:
        most = wanted + _OTHER_FILES
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = wanted if soft == resource.RLIM_INFINITY else max(_LEAST_CONNECTIONS, soft - _OTHER_FILES)
    if asked is not None and asked > possible:
        remedy = f"the process may open {soft} files: give at most {possible}, or raise ulimit -n"
        raise InvalidConfig("max_connections", asked, remedy)
    return min(wanted, possible)


def tls_of(access: AccessConfig) -> ssl.SSLContext | None:
    """Return what HTTPS is served with, if there is a certificate. Raises InvalidConfig."""
    if access.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # A password is never asked for: a server has nobody at its terminal.
        context.load_cert_chain(access.tls_cert, access.tls_key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error
        remedy = (
            f"with {str(access.tls_key)!r} it cannot be used ({reason}): give a PEM certificate and its key"
        )
        raise InvalidConfig("tls_cert", str(access.tls_cert), remedy) from error
    return context
