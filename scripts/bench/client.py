"""The load: so many clients that ask, read streams as they come, and note the times. The benchmark's door to
HTTP.

It may not know where the questions come from, nor what is made of the outcomes.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any

import aiohttp

from scripts.bench.question import Question
from scripts.bench.traffic import Arrival, Fault

DONE = b"[DONE]"
JSON = {"Content-Type": "application/json"}
SHORTEST_PATIENCE_S = 0.05


class Verdict(Enum):
    """How a request ended, seen from its client."""

    OK = "ok"  # a whole answer, and the right one if there is one
    WRONG = "wrong"  # a whole answer, but not the right one
    LEFT = "left"  # the client left, as it was meant to
    REFUSED = "refused"  # malformed, and told so
    TURNED_AWAY = "turned away"  # sound, but the server was too busy and said so
    FAILED = "failed"  # anything else


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request's end. `sent_s` and `piece_times_s` are seconds since the load began; a piece is an event
    with text. `late_s` is how long the request was due before a client was free to send it."""

    arrival: Arrival
    verdict: Verdict
    sent_s: float
    late_s: float
    piece_times_s: tuple[float, ...] = ()
    output_tokens: int = 0
    detail: str = ""

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
    """The JSON values of a stream of server-sent events, up to its end mark. Raises ValueError if it has none."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        value = line.removeprefix(b"data:").strip()
        if value == DONE:
            return
        yield json.loads(value)
    raise ValueError("the stream ended without its end mark")


def text_of(event: Mapping[str, Any]) -> str:
    """What an event of either endpoint adds to the answer."""
    return "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in event["choices"]
    )


class Load:
    """Clients against one server. `ask` makes an arrival's question; `rng` decides when clients leave."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, ask: Callable[[Arrival], Question], rng: Random
    ) -> None:
        self._session = session
        self._url = url
        self._ask = ask
        self._rng = rng
        self._start_s = 0.0

    async def run(self, arrivals: Iterator[Arrival], clients: int, duration_s: float) -> list[Outcome]:
        """Send every arrival at its time, or as soon as one of the clients is free; none after `duration_s`."""
        self._start_s = time.perf_counter()
        outcomes: list[Outcome] = []

        async def client() -> None:
            for arrival in arrivals:  # shared: who is free takes the next
                if max(arrival.at_s, self._now_s()) > duration_s:
                    return
                await asyncio.sleep(max(0.0, arrival.at_s - self._now_s()))
                outcomes.append(await self._send(arrival))

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return outcomes

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    async def _send(self, arrival: Arrival) -> Outcome:
        """Ask one question and judge what comes. Never raises for what a server or a network may do."""
        question = self._ask(arrival)
        leaves_after = self._leaves_after(arrival)
        patience_s = self._rng.uniform(0, SHORTEST_PATIENCE_S) if leaves_after == 0 else None
        reading = Reading(question, leaves_after, self._now_s)
        sent_s = self._now_s()
        try:
            async with (
                asyncio.timeout(patience_s),
                self._session.post(self._url + question.path, data=question.body, headers=JSON) as response,
            ):
                verdict, detail = await reading.judge(response, arrival)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            left = patience_s is not None and isinstance(error, TimeoutError)
            verdict, detail = (
                (Verdict.LEFT, "") if left else (Verdict.FAILED, f"{type(error).__name__}: {error}")
            )
        return Outcome(
            arrival=arrival,
            verdict=verdict,
            sent_s=sent_s,
            late_s=max(0.0, sent_s - arrival.at_s),
            piece_times_s=tuple(reading.piece_times_s),
            output_tokens=reading.output_tokens,
            detail=detail,
        )

    def _leaves_after(self, arrival: Arrival) -> int | None:
        """How many pieces a leaving client waits for; 0: it leaves at once, whatever has come."""
        if arrival.fault is not Fault.LEAVES:
            return None
        return self._rng.randint(0, max(1, arrival.output_tokens // 2))


class Reading:
    """One response on its way in."""

    def __init__(self, question: Question, leaves_after: int | None, now_s: Callable[[], float]) -> None:
        self.piece_times_s: list[float] = []
        self.output_tokens = 0
        self._question = question
        self._leaves_after = leaves_after
        self._now_s = now_s
        self._text = ""

    async def judge(self, response: aiohttp.ClientResponse, arrival: Arrival) -> tuple[Verdict, str]:
        """Read what there is to read; the verdict and what a person should know of it."""
        if response.status != 200:
            return refusal(response.status, await response.read(), arrival)
        if arrival.fault not in (None, Fault.LEAVES):
            return Verdict.FAILED, f"a malformed request ({arrival.fault.value}) was answered with 200"
        if await self._read(response):
            response.close()  # drops the connection, as a killed process would
            return Verdict.LEFT, ""
        if self._question.answer is not None and self._text.strip() != self._question.answer:
            return Verdict.WRONG, f"{self._text!r} is not {self._question.answer!r}"
        return Verdict.OK, ""

    async def _read(self, response: aiohttp.ClientResponse) -> bool:
        """Take in the stream; True if the client left before its end. Raises ValueError for an error event."""
        async for event in events(response):
            if "error" in event:
                raise ValueError(f"an error event: {event['error']}")
            if text := text_of(event):
                self.piece_times_s.append(self._now_s())
                self._text += text
            if usage := event.get("usage"):
                self.output_tokens = usage["completion_tokens"]
            if self._leaves_after is not None and len(self.piece_times_s) >= self._leaves_after:
                self.output_tokens = len(self.piece_times_s)
                return True
        return False


def refusal(status: int, body: bytes, arrival: Arrival) -> tuple[Verdict, str]:
    """A status other than 200: right for a malformed request if it names the client's fault in an error
    object, bearable for a sound one if the server is too busy. Raises ValueError for a body that is no
    JSON."""
    message = json.loads(body)["error"]["message"]
    if arrival.fault not in (None, Fault.LEAVES) and 400 <= status < 500 and status != 429:
        return Verdict.REFUSED, ""
    if status == 429:
        return Verdict.TURNED_AWAY, message
    return Verdict.FAILED, f"status {status}: {message}"
