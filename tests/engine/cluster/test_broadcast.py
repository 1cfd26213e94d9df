"""What many members that come together cost the coordinator: the whole view is made and encoded for all of them."""

import asyncio

import pytest

from engine.cluster.control import broadcast
from engine.cluster.control.control_messages import ViewChange
from engine.cluster.control.view_codec import ViewEncoder
from tests.engine.cluster.control_rig import control_rig, until

MEMBERS = 30


def test_members_that_come_at_once_are_told_the_whole_view_together(monkeypatch: pytest.MonkeyPatch) -> None:
    wholes: list[int] = []
    whole = ViewEncoder.whole

    def counted(self: ViewEncoder) -> list[ViewChange]:
        wholes.append(1)
        return whole(self)

    monkeypatch.setattr(ViewEncoder, "whole", counted)
    monkeypatch.setattr(broadcast, "_GATHER_S", 1.0)  # long beside what it takes to connect

    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator()
            nodes = [rig.node(f"n{at}") for at in range(MEMBERS)]
            await until(lambda: all(len(client.view.members) == MEMBERS for _, client in nodes))

    asyncio.run(scenario())
    assert len(wholes) < MEMBERS / 2
