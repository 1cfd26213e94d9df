"""Ask a server over gRPC and wait for the answers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self, TypeVar

import grpc

from engine.catalogue.base import AdapterRecord
from engine.client import calls
from engine.client.calls import ClientCall, GeneratedText, RequestTerms, ServerInfo
from engine.client.channels import ServerAddress, failure_of
from scheduler.request import SamplingParams

R = TypeVar("R")
_DEFAULTS = SamplingParams()


class Client:
    """A server's client. Any thread may use it; `with Client(...) as client` closes it at the end.

    >>> client = Client("127.0.0.1:8001")
    >>> client.generate("garden", SamplingParams(temperature=0), adapter="reverse")[0].text

    Calls raise CallFailed for whatever the server refuses, and InvalidParameter for what would not be sent.
    """

    def __init__(
        self,
        target: str,
        *,
        key: str | None = None,
        tls: bool = False,
        authority: str | Path | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Connect when first asked. Calls end after `timeout_s`; `key`, `tls` and `authority` as ServerAddress."""
        address = ServerAddress(target, key, tls, authority)
        self._channel, self._metadata, self._timeout_s = address.channel(), address.metadata, timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what still runs is aborted."""
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams = _DEFAULTS,
        adapter: str | None = None,
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
    ) -> tuple[GeneratedText, ...]:
        """Return the whole answers, `params.n` of them; without an adapter the base answers. Terms as RequestTerms."""
        terms = RequestTerms(request_id, priority, cache_salt)
        return self._answer(calls.generate(prompt, params, adapter, terms))

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams = _DEFAULTS,
        adapter: str | None = None,
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
    ) -> Iterator[GeneratedText]:
        """Yield the answers in parts, those of all sequences interleaved; closing it aborts what still runs."""
        terms = RequestTerms(request_id, priority, cache_salt)
        return self._parts(calls.generate_stream(prompt, params, adapter, terms))

    def abort(self, *request_ids: str) -> None:
        """End requests that were begun with the same key, by the ids that they were given."""
        self._answer(calls.abort(request_ids))

    def server_info(self) -> ServerInfo:
        """Return what the server is."""
        return self._answer(calls.server_info())

    def adapters(self) -> Iterator[AdapterRecord]:
        """Yield what is known of each adapter, in order of names."""
        after, more = "", True
        while more:
            page, after = self._answer(calls.list_adapters(after))
            yield from page
            more = bool(after)

    def adapter(self, name: str) -> AdapterRecord:
        """Return what is known of one adapter."""
        return self._answer(calls.adapter(name))

    def load_adapter(self, name: str, source: str | Path, *, replace: bool = False) -> AdapterRecord:
        """Let `name` mean what a folder of the server holds, which lies below one of its allowed roots."""
        return self._answer(calls.load_adapter(name, source, replace))

    def unload_adapter(self, name: str) -> None:
        """Let `name` mean nothing; requests that run under it finish."""
        self._answer(calls.unload_adapter(name))

    def pin_adapter(self, name: str, copies: int = 1) -> AdapterRecord:
        """Keep at least so many copies of an adapter; 0 undoes that."""
        return self._answer(calls.pin_adapter(name, copies))

    def _answer(self, call: ClientCall[R]) -> R:
        method = self._channel.unary_unary(
            call.path, type(call.request).SerializeToString, call.response.FromString
        )
        try:
            return call.read(method(call.request, timeout=self._timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise failure_of(error) from None

    def _parts(self, call: ClientCall[tuple[GeneratedText, ...]]) -> Iterator[GeneratedText]:
        method = self._channel.unary_stream(
            call.path, type(call.request).SerializeToString, call.response.FromString
        )
        running = method(call.request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            for response in running:
                yield from call.read(response)
        except grpc.RpcError as error:
            raise failure_of(error) from None
        finally:
            running.cancel()
