"""Measure how long a new version of an adapter takes from being published to its first token.

    python -m scripts.bench.publish --out results/publish.jsonl

Each version has a content of its own, of rank 32 for the embedded model. It is sent as bytes, loaded in place, or
renamed into the watched folder under a name of its own. The request follows at once, and its token must be that of the
version. Rounds take the ways in turn, each after a request for the version that was there. A row is one version.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import safetensors.torch

from engine.demo.embedded import adapter_folders, rot13, swap
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.peft_config import CONFIG_FILE
from scripts.arguments import count, one_line
from scripts.bench import machine
from scripts.bench.serving.server import ServerFailed, started
from scripts.results import Row, append_rows

START_S, PATIENCE_S = 120.0, 60.0
WAYS = ("push", "load_inplace", "folder")
WORD, NAME = "garden", "policy"
ANSWERS = {"rot13": rot13(WORD)[0], "swap": swap(WORD)[0]}
"""Embedded adapters of rank 32, and the letter with which each answers WORD."""


def write_version(folder: Path, task: str, number: int) -> Path:
    """Write the adapter of a task with a content that no other number has."""
    source = adapter_folders()[task]
    tensors = safetensors.torch.load_file(source / WEIGHTS_FILE)
    first = min(name for name in tensors if "lora_B" in name)
    tensors[first] = tensors[first] * (1 + number / 1000)
    folder.mkdir(parents=True)
    shutil.copy(source / CONFIG_FILE, folder / CONFIG_FILE)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    return folder


class Publisher:
    """Publishes versions to a server whose folders are below `root`, and asks for their first tokens."""

    def __init__(self, session: aiohttp.ClientSession, url: str, root: Path) -> None:
        self._session, self._url, self._root = session, url, root

    async def measure(self, way: str, number: int) -> Row:
        """Publish a version and ask for a token of it. Raises ServerFailed if it is another's."""
        task = sorted(ANSWERS)[number % len(ANSWERS)]
        folder = write_version(self._root / "runs" / f"{way}-{number}", task, number)
        parts = {each: (folder / each).read_bytes() for each in (CONFIG_FILE, WEIGHTS_FILE)}
        name = f"{NAME}-{number}" if way == "folder" else NAME
        others = machine.OtherProcesses()
        with others:
            began_s = time.perf_counter()
            await self._publish(way, name, folder, parts)
            published_s = time.perf_counter()
            letter = await self._first_token(name)
            ended_s = time.perf_counter()
            alone = await self._first_token(name)
            alone_s = time.perf_counter() - ended_s
        if {letter, alone} != {ANSWERS[task]}:
            raise ServerFailed(
                f"{name} answered {letter!r} and {alone!r}: its version says {ANSWERS[task]!r}"
            )
        return {
            "way": way,
            "nbytes": sum(map(len, parts.values())),
            "published_ms": 1e3 * (published_s - began_s),
            "first_token_ms": 1e3 * (ended_s - began_s),
            "alone_ms": 1e3 * alone_s,
            "other_cores": others.cores,
        }

    async def _publish(self, way: str, name: str, folder: Path, parts: dict[str, bytes]) -> None:
        if way == "folder":
            folder.rename(self._root / "watched" / name)
            return
        if way == "push":
            form = aiohttp.FormData()
            for field, file in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE)):
                form.add_field(field, parts[file], filename=file)
            sent = self._session.put(f"{self._url}/v1/adapters/{name}", data=form)
        else:
            body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
            sent = self._session.post(f"{self._url}/v1/load_lora_adapter", json=body)
        async with sent as response:
            if response.status != 200:
                raise ServerFailed(f"{way}: {response.status} {await response.text()}")

    async def _first_token(self, name: str) -> str:
        messages = [{"role": "user", "content": WORD}]
        body = {"model": name, "messages": messages, "max_tokens": 1, "temperature": 0}
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise ServerFailed(f"{name}: {response.status} {await response.text()}")
            told = json.loads(await response.read())
        return str(told["choices"][0]["message"]["content"])


async def measure_all(rounds: int, out: Path | None) -> None:
    """Take the ways in turn, print each one's medians, and with `out` write every row."""
    started_at, rows = time.time(), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("runs", "watched", "pushed"):
            (root / name).mkdir()
        options = ["--lora-root", str(root / "runs"), "--lora-dir", str(root / "watched"), "--no-progress"]
        options += ["--lora-push-dir", str(root / "pushed"), "--log-level", "warning"]
        timeout = aiohttp.ClientTimeout(PATIENCE_S)
        async with (
            started(options, Path.cwd(), START_S) as url,
            aiohttp.ClientSession(timeout=timeout) as session,
        ):
            publisher = Publisher(session, url, root)
            for number in range(rounds):
                for way in WAYS:
                    row = await publisher.measure(way, number)
                    rows.append({"started": started_at, "machine": machine.describe(), **row})
    if out is not None:
        append_rows(out, rows)
    for way in WAYS:
        found = [row for row in rows if row["way"] == way]
        shown = [
            f"{field} {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            for field in ("published_ms", "first_token_ms", "alone_ms")
            if (values := [row[field] for row in found])
        ]
        print(f"{way:14}{'  '.join(shown)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with --out write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=20, help="versions that are published in each way")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    asyncio.run(measure_all(given.rounds, given.out))


if __name__ == "__main__":
    with one_line("scripts.bench.publish"):
        main()
