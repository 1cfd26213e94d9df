"""Ask a server over gRPC, from Python: `Client` waits, `AsyncClient` is for asyncio. It needs no model and no torch."""

from engine.client.async_client import AsyncClient
from engine.client.calls import CallFailed, GeneratedText, ServerInfo
from engine.client.client import Client

__all__ = ["AsyncClient", "CallFailed", "Client", "GeneratedText", "ServerInfo"]
