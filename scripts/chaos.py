"""Kill, stop and restart the processes of a live cluster under load, and count what clients see of it.

    python -m scripts.chaos --nodes 4 --routers 2 --seconds 120 --every 4

It starts the embedded model as a cluster on this machine, in float32. Before anything goes wrong each question is asked
once; later answers must equal the first. Then chance picks a node, a router or the coordinator every few seconds. It
is killed, told to end, or halted for a while. A client whose router is gone asks another one, which is counted;
any other failure is a lost request.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import aiohttp
import psutil

from engine.demo.embedded import TASKS
from scripts.arguments import count, one_line, positive

_READY_S = 60.0
_ASK_S = 60.0
_HALT_S = 3.0  # longer than a router waits for a silent node


@dataclass(slots=True)
class Seen:
    """What clients saw."""

    answered: int = 0
    wrong: int = 0
    lost: int = 0
    refused: int = 0
    router_gone: int = 0
    first_token_s: list[float] = field(default_factory=list[float])
    faults: Counter[str] = field(default_factory=Counter[str])
    failures: list[str] = field(default_factory=list[str])


class Load:
    """Clients that ask again and again, at whichever router answers."""

    def __init__(self, ports: Sequence[int], questions: Sequence[tuple[str, str]], seed: int) -> None:
        self.seen, self._ports, self._questions = Seen(), ports, questions
        self._rng = Random(seed)
        self._expected: dict[tuple[str, str], str] = {}

    async def learn(self, session: aiohttp.ClientSession) -> None:
        """Ask each question once, while all is well."""
        for question in self._questions:
            answer, _ = await self._ask(session, self._ports[0], question)
            self._expected[question] = answer

    def right_by_task(self) -> int:
        """Count the first answers that are those of their tasks."""
        tasks = {task.name: task for task in TASKS}
        return sum(answer == tasks[name].answer(text) for (name, text), answer in self._expected.items())

    async def client(self, session: aiohttp.ClientSession, until_s: float) -> None:
        """Ask one question after another."""
        while time.monotonic() < until_s:
            await self._one(session, self._rng.choice(self._questions))

    async def _one(self, session: aiohttp.ClientSession, question: tuple[str, str]) -> None:
        seen = self.seen
        give_up_s = time.monotonic() + _ASK_S
        while True:
            port = self._rng.choice(self._ports)
            try:
                answer, first_s = await self._ask(session, port, question)
            except aiohttp.ClientResponseError as error:
                if error.status == 429:
                    seen.refused += 1
                    return
                if error.status == 503 and time.monotonic() < give_up_s:
                    seen.router_gone += 1  # it drains, or has just begun: another one answers
                    await asyncio.sleep(0.1)
                    continue
                self._lose(f"{error.status} {error.message}")
                return
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                seen.router_gone += 1  # it was killed, halted or is not back yet: as behind any balancer
                if time.monotonic() > give_up_s:
                    self._lose("no router answered")
                    return
                await asyncio.sleep(0.1)
                continue
            seen.answered += 1
            seen.first_token_s.append(first_s)
            if answer != self._expected[question]:
                seen.wrong += 1
                seen.failures.append(f"{question}: {answer!r} in place of {self._expected[question]!r}")
            return

    def _lose(self, why: str) -> None:
        self.seen.lost += 1
        self.seen.failures.append(why)

    async def _ask(
        self, session: aiohttp.ClientSession, port: int, question: tuple[str, str]
    ) -> tuple[str, float]:
        """Return a streamed answer, and the seconds to its first token."""
        name, text = question
        body = {
            "model": name,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 48,
            "stream": True,
        }
        began_s, first_s, parts = time.monotonic(), 0.0, list[str]()
        timeout = aiohttp.ClientTimeout(total=_ASK_S, sock_connect=2.0, sock_read=20.0)
        async with session.post(
            f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=timeout
        ) as response:
            if response.status != 200:
                message = (await response.text())[:300]
                raise aiohttp.ClientResponseError(
                    response.request_info, (), status=response.status, message=message
                )
            ended = False
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    ended = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    self.seen.failures.append(f"stream: {event['error']}")
                    raise aiohttp.ClientResponseError(
                        response.request_info, (), status=500, message=str(event["error"])
                    )
                for choice in event["choices"]:
                    if (content := choice["delta"].get("content")) and not first_s:
                        first_s = time.monotonic() - began_s
                    parts.append(content or "")
            if not ended:
                raise aiohttp.ClientConnectionError("the stream broke off")
        return "".join(parts), first_s


async def _wait_ready(session: aiohttp.ClientSession, ports: Sequence[int], adapters: int) -> None:
    """Wait until every router knows nodes and adapters."""
    deadline_s = time.monotonic() + _READY_S
    for port in ports:
        while True:
            try:
                async with (
                    session.get(f"http://127.0.0.1:{port}/v1/models") as models,
                    session.get(f"http://127.0.0.1:{port}/health") as health,
                ):
                    found = (await models.json())["data"]
                    if health.status == 200 and len(found) > adapters:
                        break
            except (aiohttp.ClientError, ConnectionError):
                pass
            if time.monotonic() > deadline_s:
                raise ValueError(f"port={port}: no router was ready within {_READY_S:g} s")
            await asyncio.sleep(0.2)


async def _trouble(launcher: int, seen: Seen, every_s: float, until_s: float, rng: Random) -> None:
    """Do something bad every few seconds."""
    while time.monotonic() + every_s < until_s:
        await asyncio.sleep(every_s)
        victims = {_role(child): child for child in psutil.Process(launcher).children() if _role(child)}
        if not victims:
            continue
        name = rng.choice(sorted(victims))
        kind = rng.choices(("killed", "told to end", "halted"), (3, 1, 1))[0]
        victim = victims[name]
        seen.faults[f"{name.rpartition('-')[0] or name} {kind}"] += 1
        try:
            if kind == "killed":
                victim.send_signal(signal.SIGKILL)
            elif kind == "told to end":
                victim.send_signal(signal.SIGTERM)
            else:
                victim.send_signal(signal.SIGSTOP)
                await asyncio.sleep(_HALT_S)
                victim.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            continue


def _role(process: psutil.Process) -> str:
    """Return the name of a cluster's process, or nothing."""
    try:
        line = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
    if "--node-name" in line:
        return line[line.index("--node-name") + 1]
    return "coordinator" if "coordinator" in line else ""


async def run(options: argparse.Namespace) -> Seen:
    """Run a cluster through trouble."""
    rng = Random(options.seed)
    tasks = [(task, rng) for task in TASKS]
    questions = [(task.name, task.make_input(rng)) for task, rng in tasks for _ in range(options.questions)]
    ports = [options.port + at for at in range(options.routers)]
    command = [
        sys.executable, "-m", "engine.serve", "--nodes", str(options.nodes), "--routers", str(options.routers),
        "--port", str(options.port), "--dtype", "float32", "--drain-s", "5", "--slo-ttft-s", str(options.ttft),
        "--slo-tbt-s", "1", "--no-progress", "--log-level", "warning",
    ]  # fmt: skip
    with Path(options.log).open("wb") as log:
        launcher = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        load = Load(ports, questions, options.seed)
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
                await _wait_ready(session, ports, len(TASKS))
                await load.learn(session)
                sys.stderr.write(f"{load.right_by_task()} of {len(questions)} first answers are right\n")
                until_s = time.monotonic() + options.seconds
                clients = [load.client(session, until_s) for _ in range(options.clients)]
                await asyncio.gather(_trouble(launcher.pid, load.seen, options.every, until_s, rng), *clients)
        finally:
            if launcher.returncode is None:
                launcher.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(launcher.wait(), 60)
                except TimeoutError:
                    launcher.kill()
    return load.seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 if nothing was lost and nothing wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=count, default=4)
    parser.add_argument("--routers", type=count, default=2)
    parser.add_argument("--seconds", type=positive, default=60.0)
    parser.add_argument("--every", type=positive, default=4.0, help="seconds from one fault to the next")
    parser.add_argument("--clients", type=count, default=8)
    parser.add_argument("--questions", type=count, default=8, help="of each task")
    parser.add_argument(
        "--ttft", type=positive, default=20.0, help="within which a first token is to come, in s"
    )
    parser.add_argument("--port", type=count, default=18700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", default=os.devnull, help="where the cluster's log goes")
    options = parser.parse_args(arguments)
    with one_line("scripts.chaos"):
        seen = asyncio.run(run(options))
    first = sorted(seen.first_token_s) or [0.0]
    told = asdict(seen) | {"first_token_s": None, "faults": dict(seen.faults), "failures": seen.failures[:20]}
    told["ttft_p50_s"], told["ttft_p95_s"] = first[len(first) // 2], first[int(len(first) * 0.95)]
    sys.stdout.write(json.dumps(told, indent=1) + "\n")
    return 1 if seen.lost or seen.wrong or not seen.answered else 0


if __name__ == "__main__":
    sys.exit(main())
