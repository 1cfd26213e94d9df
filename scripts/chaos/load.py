"""Ask a cluster as clients behind a balancer do: at any router, and at another one where the first has gone.

What is asked comes at its times, however slow the answers are. A client goes on to another router after a connection
that failed, a 503, or a stream that broke; after 429 it gives up, and after any other failure it counts as lost.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp
from tqdm import tqdm

from scripts.chaos.questions import Answers, Asked
from scripts.chaos.records import Outcome, Records, RequestRecord

_GIVE_UP_S = 90.0
_PAUSE_S = 0.2
_SILENT_S = 20.0
_TIMES = aiohttp.ClientTimeout(total=_GIVE_UP_S, sock_connect=2.0, sock_read=_SILENT_S)
_GONE = (aiohttp.ClientError, ConnectionError, TimeoutError)


class Answered(Exception):
    """An answer that is none: its status, and what it says."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class StreamFailed(Exception):
    """A stream that began, and was ended by an error that it told."""


class StreamBroke(Exception):
    """A stream that began, and was cut off."""


class StreamSilent(Exception):
    """A stream that began, and of which nothing came for a while."""


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """A whole answer: its text, its tokens as the server counts them, and when its first text came."""

    text: str
    tokens: int
    first_at_s: float


class ClientLoad:
    """All clients. Used on one event loop."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        routers: dict[str, str],
        answers: Answers,
        is_troubled: Callable[[str], bool],
        rng: Random,
    ) -> None:
        """Ask `routers`, which are addresses by name; `is_troubled` tells of one whether a fault has befallen it."""
        self.records = Records()
        self.retries: Counter[str] = Counter()  # why clients went on to another router
        self._session, self._routers, self._answers = session, routers, answers
        self._is_troubled, self._rng = is_troubled, rng

    async def play(self, asked: Sequence[Asked], began_s: float) -> None:
        """Ask everything at its time, and show how much has ended; return when all has."""
        with tqdm(total=len(asked), unit="request") as bar:
            async with asyncio.TaskGroup() as clients:
                for each in asked:
                    await asyncio.sleep(max(0.0, began_s + each.at_s - time.monotonic()))
                    client = clients.create_task(self._one(each, began_s))
                    client.add_done_callback(lambda _: bar.update())

    async def _one(self, asked: Asked, began_s: float) -> None:
        sent_s, attempts = time.monotonic(), 0
        found: tuple[Outcome, str] = "lost", f"no answer within {_GIVE_UP_S:g} s"
        first_s: float | None = None
        while time.monotonic() < sent_s + _GIVE_UP_S:
            router, attempts = self._rng.choice(tuple(self._routers)), attempts + 1
            try:
                answer = await self._ask(self._routers[router], asked)
            except Exception as error:  # noqa: BLE001 - each is told apart, and what is not known is lost
                ended = self._failed(router, error)
                if ended is not None:
                    found = ended
                    break
                await asyncio.sleep(_PAUSE_S)
                continue
            first_s = answer.first_at_s - sent_s
            is_right = self._answers.is_right(asked, answer.text, answer.tokens)
            found = ("right", "") if is_right else ("wrong", f"{asked.adapter.name} of {asked.text}")
            break
        self.records.requests.append(
            RequestRecord(
                sent_s - began_s, time.monotonic() - began_s, asked.adapter.name, asked.tokens, attempts,
                first_s, *found,
            )
        )  # fmt: skip

    def _failed(self, router: str, error: Exception) -> tuple[Outcome, str] | None:
        """Say what became of a request by an attempt that failed; None if it is to be asked again."""
        match error:
            case Answered(status=429):
                return "refused", ""
            case Answered(status=503):
                self.retries[f"503 {error.message}"] += 1
            case StreamFailed():
                self.retries[f"an error in a stream: {error}"] += 1
                self.records.streams_failed += not self._is_troubled(router)
            case StreamBroke():
                self.retries["a stream broke"] += 1
                self.records.streams_broken += not self._is_troubled(router)
            case StreamSilent():
                self.retries[f"a stream was silent for {_SILENT_S:g} s"] += 1
                self.records.streams_silent += not self._is_troubled(router)
            case _ if isinstance(error, _GONE):
                self.retries[f"no router: {type(error).__name__}"] += 1
            case _:
                return "lost", f"{type(error).__name__}: {error}"
        return None

    async def _ask(self, address: str, asked: Asked) -> StreamedAnswer:
        """Return a streamed answer. Raises the exceptions above, and what a connection raises."""
        body = {
            "model": asked.adapter.name,
            "messages": [{"role": "user", "content": asked.text}],
            "temperature": 0,
            "max_tokens": asked.tokens,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        url = f"{address}/v1/chat/completions"
        async with self._session.post(url, json=body, timeout=_TIMES) as response:
            if response.status != 200:
                raise Answered(response.status, _message(await response.text()))
            try:
                return await _read(response)
            except TimeoutError as error:
                raise StreamSilent from error
            except _GONE as error:
                raise StreamBroke from error


async def _read(response: aiohttp.ClientResponse) -> StreamedAnswer:
    parts, tokens, first_at_s = list[str](), 0, 0.0
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            return StreamedAnswer("".join(parts), tokens, first_at_s)
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            raise StreamFailed(str(event["error"]["message"]))
        if event.get("usage"):
            tokens = int(event["usage"]["completion_tokens"])
        for choice in event["choices"]:
            if content := choice["delta"].get("content"):
                first_at_s = first_at_s or time.monotonic()
                parts.append(content)
    raise StreamBroke


def _message(text: str) -> str:
    """Return what an error's body says."""
    try:
        return str(json.loads(text)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return text[:200]
