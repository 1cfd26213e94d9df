"""Measure what control streams cost: python -m scripts.bench.control [--adapters N] [--members N] [--seconds S].

A coordinator in a process of its own, and members that hold no bytes, over sockets of this machine. It counts once all
members know all adapters. Each member reports every second, and demand for one adapter a second grows.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import resource
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import grpc.aio

from engine.catalogue.base import CatalogueEntry
from engine.catalogue.catalogue_file import CatalogueFile, RegisteredName
from engine.cluster.control.ask_messages import Answer, Ask
from engine.cluster.control.control_client import ControlClient, CoordinatorConnection
from engine.cluster.control.control_messages import VERSION, MemberHello
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

_PROFILE = Path("scheduler/cluster/profiles/h100_llama8b.json")
_MACHINE = NodeHardware(8 << 30, OperatingPoints((8, 128), (4000.0, 2000.0)))
_MOST_JOIN_S = 240.0
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
        pipe.send((usage.ru_utime + usage.ru_stime, sum(sent), len(server.coordinator.table.shares)))
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


async def _measure(adapters: int, members: int, seconds: float) -> Mapping[str, float | str]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_coordinate, args=(adapters, theirs), daemon=True
    )
    process.start()
    port = await asyncio.to_thread(ours.recv)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
    connection = CoordinatorConnection(lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}", options))
    nodes = [_Member(f"n{at}", int(time.time() * 1000)) for at in range(members)]
    views = [ClusterView() for _ in nodes]
    clients: list[ControlClient] = []
    for node, view in zip(nodes, views, strict=True):
        hello = MemberHello(VERSION, node.agent.node, "node", node.session)
        clients.append(ControlClient(hello, connection, view, node.agent.report, node))

    def asked() -> tuple[float, int, int]:
        ours.send(True)
        return ours.recv()

    began_s = time.monotonic()
    for client in clients:
        client.start()
    while not all(len(view.table.shares) == adapters for view in views):
        await asyncio.sleep(0.5)
        if time.monotonic() - began_s > _MOST_JOIN_S:
            raise SystemExit(f"not all members knew all adapters within {_MOST_JOIN_S:g} s: nothing is kept")
    joined_s = time.monotonic() - began_s
    cpu_s, sent, _ = await asyncio.to_thread(asked)
    start_s = time.monotonic()
    for at in itertools.count():
        if time.monotonic() - start_s >= seconds:
            break
        nodes[at % members].agent.took(_ref(at % adapters), 4000)
        await asyncio.sleep(1.0)
    took_s = time.monotonic() - start_s
    after_cpu_s, after_sent, _ = await asyncio.to_thread(asked)
    await asyncio.gather(*(client.close() for client in clients))
    ours.send(False)
    process.join(10)
    bytes_per_s = (after_sent - sent) / took_s
    return {
        "adapters": adapters,
        "members": members,
        "seconds": took_s,
        "until_all_know_all_s": joined_s,
        "bytes_until_then": sent,
        "sent_bytes_per_s": bytes_per_s,
        "sent_bytes_per_s_and_member": bytes_per_s / members,
        "coordinator_cpu_share": (after_cpu_s - cpu_s) / took_s,
        "coordinator_cpu_until_then_s": cpu_s,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once, and print the row; `--output` adds it to a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=count, default=10_000)
    parser.add_argument("--members", type=count, default=256)
    parser.add_argument("--seconds", type=positive, default=30.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    row = json.dumps(asyncio.run(_measure(args.adapters, args.members, args.seconds)))
    print(row)
    if args.output is not None:
        with args.output.open("a") as file:
            file.write(row + "\n")


if __name__ == "__main__":
    main()
