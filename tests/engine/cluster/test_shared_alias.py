"""An alias with shares in a cluster: every member knows it, and so does the next coordinator."""

import asyncio
from pathlib import Path

import pytest

from engine.catalogue.alias_targets import AliasTarget
from engine.errors import InvalidAdapterName, UnknownModel
from tests.engine.cluster.control_rig import control_rig, until

HALVES = (AliasTarget("poet", 0.5), AliasTarget("novel", 0.5))


def test_an_alias_with_shares_is_known_everywhere_and_to_the_next_coordinator(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator(tmp_path / "catalogue")
            rig.node("n1")
            router = rig.router("r1")
            await until(lambda: len(router.view.members) == 1)
            admin = router.administration
            for name, folder in (("poet", "/good"), ("novel", "/good/2")):
                await admin.register(name, Path(folder), False)
            assert (await admin.set_alias("best", "poet", HALVES)).targets == HALVES
            await until(lambda: "best" in router.view.catalogue)
            entry = router.view.catalogue["best"]
            assert (entry.targets, entry.alias_of) == (HALVES, "poet")
            told = await admin.adapter("best")
            assert told is not None
            assert tuple(told.targets) == HALVES
            with pytest.raises(InvalidAdapterName, match="alias best leads to it by share"):
                await admin.remove("novel")
            with pytest.raises(InvalidAdapterName, match="target best is an alias with shares"):
                await admin.set_alias("more", "best", (AliasTarget("best", 0.5), AliasTarget("poet", 0.5)))
            with pytest.raises(UnknownModel, match="nobody"):
                await admin.set_alias("best", "poet", (HALVES[0], AliasTarget("nobody", 0.5)))
            await rig.kill_coordinator()
            await until(lambda: not router.is_connected)
            server = await rig.coordinator(tmp_path / "catalogue")
            assert server.catalogue.entries["best"].targets == HALVES
            await until(lambda: router.is_connected)
            await admin.set_alias("best", "novel")
            await until(lambda: router.view.catalogue["best"].targets == ())
            await admin.remove("poet")

    asyncio.run(scenario())
