"""Two routers of one cluster: what an administrator asks of one binds both, and tenants' limits are shared."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.base.model_card import ModelCard
from engine.catalogue.base import EntrySettings
from engine.cluster.control.control_client import ControlClient
from engine.cluster.roles.router_role import RouterRole
from engine.cluster.router.cluster_client import ClusterClient
from engine.config.command_line import serve_config
from engine.errors import AdapterBusy, AdapterHeld, NotInTime, RateLimited, UnknownModel
from engine.metrics.telemetry import Telemetry
from engine.output import RequestOutput
from engine.tenants.limit_share import LimitShare
from engine.tenants.tenant import Tenant, TenantLimits
from engine.tokenizer import Tokenizer
from scheduler.plan import FinishReason
from scheduler.request import Origin, SamplingParams
from tests.engine.cluster.control_rig import ControlRig, control_rig, until
from tests.engine.cluster.live_nodes import router_of
from tests.fakes.tokenizers import byte_tokenizer

CARD = ModelCard(("base",), "/models/base", 512, 260, (2,))
_ids = itertools.count()


@dataclass
class FrontDoor:
    """A router without links to nodes: what it accepts waits."""

    client: ClusterClient
    control: ControlClient

    @classmethod
    def join(cls, rig: ControlRig, name: str) -> "FrontDoor":
        control = rig.router(name)
        client = router_of(control.view, CARD, Tokenizer(byte_tokenizer()), control.administration)
        control.asked = client.catalogue
        control.view.changed.append(
            lambda: client.accounts.divide(LimitShare.among(name, control.view.routers))
        )
        return cls(client, control)

    async def ask(self, model: str = "poet", tenant: str = "", prompts: int = 1) -> list[RequestOutput]:
        """Have requests accepted."""
        asked = {f"r{next(_ids)}": (65, 66) for _ in range(prompts)}
        params = SamplingParams(max_tokens=4)
        return list(await self.client.submit_all(model, asked, params, Origin(tenant)))


def visit(
    scenario: Callable[[ControlRig, FrontDoor, FrontDoor], Awaitable[None]], registry: Path | None = None
) -> None:
    """Run a scenario on two routers that know the adapter `poet`, and each other."""

    async def run() -> None:
        async with control_rig() as rig:
            await rig.coordinator(registry)
            rig.node("n1")
            doors = [FrontDoor.join(rig, name) for name in ("r1", "r2")]
            await until(lambda: doors[0].control.view.known)
            await doors[0].control.administration.register("poet", Path("/good"), False)
            for door in doors:
                await until(lambda door=door: "poet" in door.control.view.catalogue)
                await until(lambda door=door: door.control.view.routers == ("r1", "r2"))
            try:
                await asyncio.wait_for(scenario(rig, *doors), 60)
            finally:
                for door in doors:
                    await door.client.close()

    asyncio.run(run())


def test_a_router_as_a_process_answers_the_coordinator_and_gives_out_its_share() -> None:
    line = ("--role", "router", "--coordinator", "127.0.0.1:9", "--peer-plain", "--node-name", "r2")
    slo = ("--slo-ttft-s", "2", "--slo-tbt-s", "1")
    token = {"LORASERVE_PEER_TOKEN": "a-token-of-sixteen"}
    role = RouterRole(serve_config((*line, *slo), token), Telemetry())
    assert role.control.asked is role.client.catalogue
    role.client.view.routers = ("r1", "r2")
    role.client.view.tell()
    assert role.client.accounts.share == LimitShare(1, 2)


def test_a_name_that_one_router_is_told_to_hold_is_held_by_all_and_by_one_that_comes_later() -> None:
    async def scenario(rig: ControlRig, first: FrontDoor, second: FrontDoor) -> None:
        await first.client.catalogue.hold("poet", 60)
        third = FrontDoor.join(rig, "r3")
        await until(lambda: third.client.may_serve("poet") and "poet" in third.control.view.catalogue)
        for door in (first, second, third):
            with pytest.raises(AdapterHeld):
                await door.ask()
        record = await second.client.catalogue.record("poet")
        assert record.held_s is not None
        assert 0 < record.held_s <= 60
        await second.client.catalogue.release("poet")
        for door in (first, second, third):
            await door.ask()
        with pytest.raises(UnknownModel):
            await first.client.catalogue.hold("nobody", 60)
        await third.client.close()

    visit(scenario)


def test_a_release_reaches_who_was_away_and_a_hold_outlives_the_coordinator(tmp_path: Path) -> None:
    async def scenario(rig: ControlRig, first: FrontDoor, second: FrontDoor) -> None:
        await first.client.catalogue.hold("poet", 60)
        await second.control.close()
        await until(lambda: first.control.view.routers == ("r1",))
        await first.client.catalogue.release("poet")
        with pytest.raises(AdapterHeld):
            await second.ask()
        second.control.start()
        await until(lambda: second.client.catalogue._uses.held.left_s("poet") is None)
        await second.ask()
        await first.client.catalogue.hold("poet", 60)
        await rig.kill_coordinator()
        await until(lambda: not first.control.is_connected)
        with pytest.raises(NotInTime, match="no coordinator answers"):
            await first.client.catalogue.release("poet")
        await rig.coordinator(tmp_path / "registry")
        await until(lambda: first.control.is_connected and second.control.is_connected)
        for door in (first, second):
            with pytest.raises(AdapterHeld):
                await door.ask()
        await second.client.catalogue.release("poet")
        for door in (first, second):
            await door.ask()

    visit(scenario, tmp_path / "registry")


def test_requests_are_aborted_at_every_router() -> None:
    async def scenario(rig: ControlRig, first: FrontDoor, second: FrontDoor) -> None:
        outputs = [*await first.ask(), *await second.ask(prompts=2)]
        others = await second.ask("base")
        assert await first.client.catalogue.abort("poet") == 3
        for output in outputs:
            assert [delta.finish_reason async for delta in output] == [FinishReason.ABORT]
        assert await first.client.catalogue.abort("poet") == 0
        assert await first.client.catalogue.abort("base") == len(others)
        for name in ("base", "nobody", "", "x" * 10_000):
            with pytest.raises(UnknownModel):
                await first.client.catalogue.abort(name)

    visit(scenario)


def test_tenants_and_adapters_have_their_limits_once_and_not_at_each_router() -> None:
    limits = TenantLimits(concurrent=3, requests_per_minute=10)

    async def scenario(rig: ControlRig, first: FrontDoor, second: FrontDoor) -> None:
        for door in (first, second):
            door.client.accounts.adopt([Tenant("a", limits=limits)])
        await first.ask(tenant="a", prompts=2)
        await second.ask(tenant="a")
        for door in (first, second):
            with pytest.raises(RateLimited, match="at once"):
                await door.ask(tenant="a")
        await first.client.catalogue.set("poet", EntrySettings(max_requests=3))
        await until(lambda: first.control.view.catalogue["poet"].max_requests == 3)
        for door in (first, second):
            with pytest.raises(AdapterBusy):
                await door.ask()
        await second.control.close()
        await until(lambda: first.control.view.routers == ("r1",))
        await first.ask(tenant="a")
        with pytest.raises(AdapterBusy):
            await first.ask()
        with pytest.raises(RateLimited, match="3 requests at once"):
            await first.ask("base", tenant="a")

    visit(scenario)
