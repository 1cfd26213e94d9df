"""Measure how late the server's event loop comes while it is sent large bodies, beside a server that is sent none.

    python -m scripts.bench.bodies --out results/large_bodies.jsonl

Each kind of body goes to a server of its own, several times, one after another. What is late is counted by the server
itself (`loraserve_event_loop_stalls_total`). What else runs on the machine makes it late too: the first and the last
row are of servers that only idle, and each row says how many cores others used.
"""

import argparse
import asyncio
import gzip
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

from scripts.arguments import count, one_line
from scripts.bench import machine
from scripts.bench.serving.server import ServerProbe, started
from scripts.results import Row, append_rows

START_S, IDLE_S, PATIENCE_S = 120.0, 10.0, 120.0
CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
STALLS, LONGEST = 'loraserve_event_loop_stalls_total{over="%s"}', "loraserve_event_loop_longest_stall_seconds"
OPTIONS = ("--max-body-bytes", "32MiB", "--max-bodies-bytes", "64MiB")


def _body(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def _said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _nested() -> bytes:
    return b'{"model": "demo", "prompt": ' + b"[" * 7_000_000 + b"]" * 7_000_000 + b"}"


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "one long text": (CHAT, lambda: _body(messages=[_said("abcd efg " * 1_700_000)])),
    "one long text of four-byte characters": (
        CHAT,
        lambda: _body(messages=[_said("abc\U0001f600" * 2_200_000)]),
    ),
    "1,000,000 ids": (COMPLETIONS, lambda: _body(prompt=[*range(100_000)] * 10)),
    "280,000 ids in 2,000 prompts": (COMPLETIONS, lambda: _body(prompt=[[7] * 140] * 2_000)),
    "nested arrays": (COMPLETIONS, _nested),
    "380,000 messages": (CHAT, lambda: _body(messages=[_said("hi")] * 380_000)),
    "10,000 messages of 1,500 characters": (CHAT, lambda: _body(messages=[_said("abcd ef" * 214)] * 10_000)),
    "2,000 prompts of 7,000 characters": (COMPLETIONS, lambda: _body(prompt=["x" * 7_000] * 2_000)),
    "1 MB to tokenize": (TOKENIZE, lambda: _body(prompt="abcd efg " * 110_000)),
}
"""Each kind of body: where it goes, and what makes it."""


async def measure(kind: str, is_zipped: bool, rounds: int) -> Row:
    """Send a kind of body to a server of its own; "" sends none, and waits."""
    path, make = BODIES[kind] if kind else ("", bytes)
    content = make()
    sent = gzip.compress(content, 6) if is_zipped else content
    headers = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if is_zipped else {})
    statuses: set[int] = set()
    timeout = aiohttp.ClientTimeout(PATIENCE_S)
    async with (
        started(OPTIONS, Path.cwd(), START_S) as url,
        aiohttp.ClientSession(timeout=timeout) as session,
    ):
        probe = ServerProbe(session, url)
        before, begun_s = await probe.metrics(), time.perf_counter()
        with machine.OtherProcesses() as others:
            if not kind:
                await asyncio.sleep(IDLE_S)
            for _ in range(rounds if kind else 0):
                async with session.post(f"{url}{path}", data=sent, headers=headers) as response:
                    statuses.add(response.status)
                    await response.read()
        took_s = time.perf_counter() - begun_s
        after = await probe.metrics()
    return {
        "body": f"{kind}{', gzip' if is_zipped else ''}" or "none",
        "nbytes": len(content),
        "sent": rounds if kind else 0,
        "statuses": sorted(statuses),
        "took_s": took_s,
        "over_20_ms": after[STALLS % "20ms"] - before[STALLS % "20ms"],
        "over_100_ms": after[STALLS % "100ms"] - before[STALLS % "100ms"],
        "longest_ms": 1e3 * after[LONGEST],
        "other_cores": others.cores,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print each row, and with --out write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=10, help="how often each body is sent")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    cases = [
        ("", False),
        *((kind, False) for kind in BODIES),
        ("one long text", True),
        ("1,000,000 ids", True),
        ("", False),
    ]
    for kind, is_zipped in cases:
        row: Row = {"machine": machine.describe(), **asyncio.run(measure(kind, is_zipped, given.rounds))}
        print(
            f"{row['body']:40} {row['nbytes'] / 1e6:5.1f} MB  {row['statuses']}  {row['took_s']:5.1f} s"
            f"  over 20 ms: {row['over_20_ms']:.0f}  longest {row['longest_ms']:.1f} ms",
            flush=True,
        )
        if given.out:
            append_rows(given.out, [row])


if __name__ == "__main__":
    with one_line("scripts.bench.bodies"):
        main()
