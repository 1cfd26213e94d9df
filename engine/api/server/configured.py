"""Make what an HTTP server needs of a configuration: who may do what, its logs, and where it listens."""

import logging

from engine.api.keys import AccessRules
from engine.api.server.listener import HttpServer
from engine.config.config import ServeConfig
from engine.errors import InvalidConfig
from engine.metrics.request_log import RequestLog
from engine.metrics.tracing import Tracing
from transport.control.security import is_loopback

_log = logging.getLogger(__name__)


def access_rules(config: ServeConfig) -> AccessRules:
    """Return who may do what; warn of a server that answers everybody who reaches it."""
    access, is_local = config.access, is_loopback(config.host)
    api_keys, tenants = access.read_api_keys(), config.tenants.read()
    if not (api_keys or tenants or is_local):
        _log.warning(
            "listening at %s without an API key: whoever reaches this server may use it; give --api-key-file "
            "or LORASERVE_API_KEY", config.host,
        )  # fmt: skip
    keyless = "everybody" if access.allow_admin_without_key else "local" if is_local else "nobody"
    admin_keys, open_metrics = access.read_admin_keys(), access.allow_metrics_without_key
    return AccessRules(api_keys, admin_keys, keyless, open_metrics, tenants)


def request_log(config: ServeConfig, tracing: Tracing | None) -> RequestLog:
    """Open the files of audit and access lines. Raises InvalidConfig."""
    try:
        return RequestLog(config.audit_log, config.access_log, config.access_log_file, tracing=tracing)
    except OSError as error:
        option = "audit_log" if error.filename == str(config.audit_log) else "access_log_file"
        remedy = f"it cannot be written ({error.strerror}): give a file in a folder that is there"
        raise InvalidConfig(option, error.filename, remedy) from error


async def listen_at(server: HttpServer, config: ServeConfig) -> str:
    """Listen where the configuration says, and return the URL. Raises InvalidConfig."""
    try:
        return await server.listen(config.host, config.port)
    except (OSError, ValueError) as error:  # a host that no name can be is a ValueError
        told = error.strerror if isinstance(error, OSError) else error
        reason = f"{config.host} cannot be bound to it ({told}): choose another port or --host"
        raise InvalidConfig("port", config.port, reason) from error
