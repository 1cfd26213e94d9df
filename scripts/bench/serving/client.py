"""Generate load: clients that send requests, read streams as they come, and note the times.

The benchmark's one use of HTTP for load. Knows neither where requests come from nor what is made of the
outcomes.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from random import Random
from typing import Any

import aiohttp

from scripts.bench.serving.http_request import HttpRequest
from scripts.bench.serving.tenants import task_name
from scripts.bench.serving.traffic import ClientFault, PlannedRequest

DONE = b"[DONE]"
JSON = {"Content-Type": "application/json"}
SHORTEST_PATIENCE_S = 0.05


class RequestEnd(Enum):
    """How a request ended, seen from its client."""

    OK = "ok"  # a whole answer, and the right one if there is one
    MISTAKEN = "mistaken"  # not the right answer, but the one that the original gives alone
    WRONG = "wrong"  # a whole answer, but not the right one
    LEFT = "left"  # the client left, as it was meant to
    REFUSED = "refused"  # malformed, and told so
    TURNED_AWAY = "turned away"  # sound, but the server was too busy and said so
    FAILED = "failed"  # anything else


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """How one request ended. Times are seconds since the load began.

    A piece is an event with text. `late_s` is how long the request was due before a client was free to send
    it. `request` is what was sent, and `text` what came. `tier` had the adapter then, "" if nobody asked.
    """

    planned: PlannedRequest
    end: RequestEnd
    sent_s: float
    late_s: float
    piece_times_s: tuple[float, ...] = ()
    output_tokens: int = 0
    request: HttpRequest | None = None
    text: str = ""
    detail: str = ""
    tier: str = ""

    @property
    def ttft_s(self) -> float:
        """From sending to the first piece; only for outcomes with pieces."""
        return self.piece_times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between each piece and the next."""
        return [
            after - before for before, after in zip(self.piece_times_s, self.piece_times_s[1:], strict=False)
        ]


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Parse the JSON values of server-sent events, up to the end mark. Raises ValueError if it has none."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        value = line.removeprefix(b"data:").strip()
        if value == DONE:
            return
        yield json.loads(value)
    raise ValueError("the stream ended without its end mark")


def text_of(event: Mapping[str, Any]) -> str:
    """Read what an event of either endpoint adds to the answer."""
    return "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in event["choices"]
    )


class LoadGenerator:
    """Clients of one server.

    `make` makes the HTTP request of a planned one; `rng` decides when clients leave. `tier` tells which tier has a
    model's weights, and is asked just before each request.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        make: Callable[[PlannedRequest], HttpRequest],
        rng: Random,
        tier: Callable[[str], Awaitable[str]] | None = None,
    ) -> None:
        self._session = session
        self._tier = tier
        self._url = url
        self._make = make
        self._rng = rng
        self._start_s = 0.0

    async def run(
        self, requests: Iterator[PlannedRequest], clients: int, duration_s: float
    ) -> list[RequestOutcome]:
        """Send every request at its time, or as soon as one of the clients is free; none after `duration_s`."""
        self._start_s = time.perf_counter()
        outcomes: list[RequestOutcome] = []

        async def client() -> None:
            for planned in requests:  # shared: who is free takes the next
                if max(planned.at_s, self._now_s()) > duration_s:
                    return
                await asyncio.sleep(max(0.0, planned.at_s - self._now_s()))
                outcomes.append(await self._send(planned))

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return outcomes

    async def ask_again(self, outcomes: Iterable[RequestOutcome]) -> list[RequestOutcome]:
        """Ask the original alone where an answer was wrong, and call the answer mistaken if it is the same.

        A model is not always right. Company, churn and eviction must never change what it says.
        """
        settled: list[RequestOutcome] = []
        for outcome in outcomes:
            if outcome.end is RequestEnd.WRONG and outcome.request is not None:
                planned = replace(outcome.planned, model=task_name(outcome.planned.model), fault=None)
                alone = await self.send(planned, outcome.request.for_model(planned.model))
                if alone.text == outcome.text:
                    outcome = replace(outcome, end=RequestEnd.MISTAKEN)
            settled.append(outcome)
        return settled

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    async def _send(self, planned: PlannedRequest) -> RequestOutcome:
        """Make one request and send it."""
        tier = "" if self._tier is None else await self._tier(planned.model)
        return replace(await self.send(planned, self._make(planned)), tier=tier)

    async def send(self, planned: PlannedRequest, request: HttpRequest) -> RequestOutcome:
        """Send one request now and judge what comes. Never raises for what a server or a network may do."""
        leaves_after = self._leaves_after(planned)
        patience_s = self._rng.uniform(0, SHORTEST_PATIENCE_S) if leaves_after == 0 else None
        reader = StreamReader(request, leaves_after, self._now_s)
        sent_s = self._now_s()
        try:
            async with (
                asyncio.timeout(patience_s),
                self._session.post(self._url + request.path, data=request.body, headers=JSON) as response,
            ):
                end, detail = await reader.judge(response, planned)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            left = patience_s is not None and isinstance(error, TimeoutError)
            end, detail = (
                (RequestEnd.LEFT, "") if left else (RequestEnd.FAILED, f"{type(error).__name__}: {error}")
            )
        return RequestOutcome(
            planned=planned,
            end=end,
            sent_s=sent_s,
            late_s=max(0.0, sent_s - planned.at_s),
            piece_times_s=tuple(reader.piece_times_s),
            output_tokens=reader.output_tokens,
            request=request,
            text=reader.text,
            detail=detail,
        )

    def _leaves_after(self, planned: PlannedRequest) -> int | None:
        """Draw how many pieces a leaving client waits for; at 0 it leaves at once, whatever has come."""
        if planned.fault is not ClientFault.LEAVES:
            return None
        return self._rng.randint(0, max(1, planned.output_tokens // 2))


class StreamReader:
    """One response on its way in."""

    def __init__(self, request: HttpRequest, leaves_after: int | None, now_s: Callable[[], float]) -> None:
        self.piece_times_s: list[float] = []
        self.output_tokens = 0
        self.text = ""
        self._request = request
        self._leaves_after = leaves_after
        self._now_s = now_s

    async def judge(
        self, response: aiohttp.ClientResponse, planned: PlannedRequest
    ) -> tuple[RequestEnd, str]:
        """Read the response; return how the request ended and what a person should know of it."""
        if response.status != 200:
            return refusal(response.status, await response.read(), planned)
        if planned.fault not in (None, ClientFault.LEAVES):
            return RequestEnd.FAILED, f"a malformed request ({planned.fault.value}) was answered with 200"
        if await self._read(response):
            response.close()  # drops the connection, as a killed process would
            return RequestEnd.LEFT, ""
        if self._request.answer is not None and self.text.strip() != self._request.answer:
            return RequestEnd.WRONG, f"{self.text!r} is not {self._request.answer!r}"
        return RequestEnd.OK, ""

    async def _read(self, response: aiohttp.ClientResponse) -> bool:
        """Take in the stream; True if the client left before its end.

        Raises ValueError for an error event.
        """
        async for event in events(response):
            if "error" in event:
                raise ValueError(f"an error event: {event['error']}")
            if text := text_of(event):
                self.piece_times_s.append(self._now_s())
                self.text += text
            if usage := event.get("usage"):
                self.output_tokens = usage["completion_tokens"]
            if self._leaves_after is not None and len(self.piece_times_s) >= self._leaves_after:
                self.output_tokens = len(self.piece_times_s)
                return True
        return False


def refusal(status: int, body: bytes, planned: PlannedRequest) -> tuple[RequestEnd, str]:
    """Judge a status other than 200. Raises ValueError for a body that is no JSON.

    It is right for a malformed request if it names the client's fault in an error object. It is bearable for
    a sound one if the server is too busy.
    """
    message = json.loads(body)["error"]["message"]
    if planned.fault not in (None, ClientFault.LEAVES) and 400 <= status < 500 and status != 429:
        return RequestEnd.REFUSED, ""
    if status == 429:
        return RequestEnd.TURNED_AWAY, message
    return RequestEnd.FAILED, f"status {status}: {message}"
