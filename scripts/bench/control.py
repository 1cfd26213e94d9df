"""Measure what control streams cost: python -m scripts.bench.control [--adapters N] [--members N] [--seconds S].

A coordinator in a process of its own, and members that hold no bytes, over sockets of this machine. Three rows follow:
from the start until all members know all adapters, then at rest, then while demand moves on to other adapters.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import grpc.aio

from engine.catalogue.base import CatalogueEntry
from engine.catalogue.catalogue_file import CatalogueFile, RegisteredName
from engine.cluster.control import control_client
from engine.cluster.control.ask_messages import Answer, Ask
from engine.cluster.control.control_client import ControlClient, CoordinatorConnection
from engine.cluster.control.control_messages import VERSION, FromMember, MemberHello
from engine.cluster.control.coordinator_server import CoordinatorServer
from engine.cluster.control.member_stream import MemberStream
from engine.cluster.view import ClusterView
from engine.rpc.bounded_server import BoundedServer, RpcBounds
from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import from_json
from scheduler.cluster.policies import OURS, Setting
from scheduler.cluster.protocol.agent import Fetch, Free, NodeAgent
from scheduler.cluster.protocol.messages import Command, NodeHardware
from scheduler.cluster.state import OperatingPoints
from scripts.arguments import count, positive
from scripts.results import Row, append_rows

_PROFILE = Path("scheduler/cluster/profiles/h100_llama8b.json")
_MACHINE = NodeHardware(8 << 30, OperatingPoints((8, 128), (4000.0, 2000.0)))
_BOUNDS = RpcBounds(connections=4096, handshake_s=5.0, idle_s=10.0, message_bytes=64 << 20)


def _ref(at: int) -> AdapterRef:
    return AdapterRef(f"{at:064x}", f"tenant/{at}", (8, 16, 32, 64)[at % 4], ("q_proj", "v_proj"), 16 << 20)


class _Member:
    """A node whose contents come at once."""

    def __init__(self, name: str, start: int) -> None:
        self.agent = NodeAgent(name, _MACHINE, start)
        self.is_leaving = False

    @property
    def session(self) -> int:
        """Return the session under which it reports."""
        return self.agent.session

    def declared(self) -> Mapping[str, str]:
        """Return no names: the catalogue has them all."""
        return {}

    def obey(self, command: Command) -> None:
        """Fetch and free at once."""
        for action in self.agent.receive(command):
            match action:
                case Fetch(adapter=adapter):
                    self.agent.arrived(adapter)
                case Free(adapter=adapter):
                    self.agent.freed(adapter)
                case _:
                    pass

    async def answer(self, ask: Ask) -> Answer:
        """Answer nothing of use: no name is declared."""
        return Answer(ask.number)


def _coordinate(adapters: int, pipe: Connection) -> None:
    """Run the coordinator: tell the port, then each time it is asked the CPU seconds and the bytes sent."""
    asyncio.run(_serve(adapters, pipe))


async def _serve(adapters: int, pipe: Connection) -> None:
    sent = _count_sent()
    profile = from_json(_PROFILE.read_text())
    file = CatalogueFile(None, time.time())
    for at in range(adapters):
        file.put(RegisteredName(CatalogueEntry(_ref(at).name, _ref(at), f"/adapters/{at}")))
    server = CoordinatorServer(OURS.coordinator(Setting(profile.model(Kernel.EXACT), profile.slo)), file)
    await server.start()
    listener = BoundedServer(_BOUNDS)
    listener.add(server.service())
    pipe.send(listener.server.add_insecure_port("127.0.0.1:0"))
    await listener.start()
    while await asyncio.to_thread(pipe.recv):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((usage.ru_utime + usage.ru_stime, sum(sent)))
    await listener.stop(0.0)
    await server.close()


def _count_sent() -> list[int]:
    """Count the bytes of every message to every member."""
    sent = [0]
    send = MemberStream.send_frame

    def counted(self: MemberStream, frame: bytes) -> None:
        sent[0] += len(frame)
        send(self, frame)

    MemberStream.send_frame = counted
    return sent


def _count_told() -> list[int]:
    """Count the bytes of every message of every member."""
    told = [0]
    encode = control_client.encoded

    def counted(message: FromMember) -> bytes:
        frame = encode(message)
        told[0] += len(frame)
        return frame

    control_client.encoded = counted
    return told


@dataclass(frozen=True, slots=True)
class _Counts:
    """What had been sent and computed by some moment."""

    at_s: float
    cpu_s: float
    sent_bytes: int
    told_bytes: int

    def row(self, before: "_Counts", members: int) -> Mapping[str, float]:
        """Return what was sent and computed a second since `before`."""
        took_s = self.at_s - before.at_s
        sent, told = (
            (self.sent_bytes - before.sent_bytes) / took_s,
            (self.told_bytes - before.told_bytes) / took_s,
        )
        return {
            "seconds": took_s,
            "to_members_bytes_per_s": sent,
            "to_each_bytes_per_s": sent / members,
            "from_each_bytes_per_s": told / members,
            "coordinator_cpu_share": (self.cpu_s - before.cpu_s) / took_s,
        }


class _Bench:
    """The coordinator's process, and members on this event loop."""

    def __init__(self, adapters: int, members: int) -> None:
        """Start the coordinator."""
        self.adapters, self.members = adapters, members
        self._told = _count_told()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_coordinate, args=(adapters, theirs), daemon=True)
        self._process.start()
        self.nodes = [_Member(f"n{at}", int(time.time() * 1000)) for at in range(members)]
        self.views = [ClusterView() for _ in self.nodes]
        self._clients: list[ControlClient] = []

    async def counts(self) -> _Counts:
        """Ask the coordinator what it has sent and computed by now."""

        def asked() -> tuple[float, int]:
            self._pipe.send(True)
            return self._pipe.recv()

        cpu_s, sent = await asyncio.to_thread(asked)
        return _Counts(time.monotonic(), cpu_s, sent, self._told[0])

    async def join(self, most_s: float) -> None:
        """Have all members join, and wait until each knows all adapters."""
        port = await asyncio.to_thread(self._pipe.recv)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
        connection = CoordinatorConnection(lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}", options))
        for node, view in zip(self.nodes, self.views, strict=True):
            hello = MemberHello(VERSION, node.agent.node, "node", node.session)
            self._clients.append(ControlClient(hello, connection, view, node.agent.report, node))
        for client in self._clients:
            client.start()
        began_s = time.monotonic()
        while not all(len(view.table.shares) == self.adapters for view in self.views):
            await asyncio.sleep(0.2)
            if time.monotonic() - began_s > most_s:
                raise SystemExit(f"not all members knew all adapters within {most_s:g} s: nothing is kept")

    async def shift(self, seconds: float) -> None:
        """Have every member take in tokens of another adapter each second."""
        end_s = time.monotonic() + seconds
        for tick in itertools.count():
            if time.monotonic() >= end_s:
                return
            for at, node in enumerate(self.nodes):
                node.agent.took(_ref((tick * self.members + at) % self.adapters), 4000)
            await asyncio.sleep(1.0)

    async def close(self) -> None:
        """End all."""
        await asyncio.gather(*(client.close() for client in self._clients))
        self._pipe.send(False)
        self._process.join(10)


async def measure(adapters: int, members: int, seconds: float, most_join_s: float) -> list[Row]:
    """Measure joining, rest and shifting demand, the last two for so many seconds each."""
    bench = _Bench(adapters, members)
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    same = {"started": started, "adapters": adapters, "members": members}
    begun = _Counts(time.monotonic(), 0.0, 0, 0)
    try:
        await bench.join(most_join_s)
        joined = await bench.counts()
        await asyncio.sleep(seconds)
        rested = await bench.counts()
        await bench.shift(seconds)
        shifted = await bench.counts()
    finally:
        await bench.close()
    phases = (("joining", joined, begun), ("rest", rested, joined), ("shifting", shifted, rested))
    return [{**same, "phase": name, **after.row(before, members)} for name, after, before in phases]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once, and print the rows; `--output` adds them to a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=count, default=10_000)
    parser.add_argument("--members", type=count, default=256)
    parser.add_argument("--seconds", type=positive, default=30.0, help="of rest, and then of shifting demand")
    parser.add_argument("--most-join-s", type=positive, default=240.0, help="give up if joining takes longer")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    rows = asyncio.run(measure(args.adapters, args.members, args.seconds, args.most_join_s))
    for row in rows:
        print(json.dumps(row))
    if args.output is not None:
        append_rows(args.output, rows)


if __name__ == "__main__":
    main()
