"""What the page's modules say of the cluster, run by Node.js on a document that draws nothing."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.catalogue.base import SizeRecord
from engine.metrics.series import MetricSeries
from tests.engine.api.page.test_page_routes import STATIC
from tests.engine.api.session import session
from tests.engine.cluster.test_observed_coordinator import open_door
from tests.page.simulated_cluster import SimulatedCluster

NODE = shutil.which("node")
STUB = Path(__file__).with_name("stub_dom.js")
BOUND_S = 60
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no Node.js on this machine")


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """The page's modules, where Node.js takes them for such."""
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for each in STATIC.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    shutil.copy(STUB, tmp_path)
    return tmp_path


async def shown(modules: Path, url: str, path: str = "") -> dict[str, str | None]:
    """The texts of the page's parts; None is hidden."""
    assert NODE is not None
    arguments = (str(modules / STUB.name), url.rstrip("/"), str(modules), path)
    async with asyncio.timeout(BOUND_S):
        process = await asyncio.create_subprocess_exec(NODE, *arguments, stdout=asyncio.subprocess.PIPE)
        told, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(told)


async def test_the_page_tells_the_size_and_why_and_what_is_held(modules: Path) -> None:
    cluster = SimulatedCluster(3, 5, ["held"])
    cluster.size = SizeRecord(4, 3, 30.0, "load", 2, 6)
    cluster.records["held"] = replace(cluster.records["held"], held_s=90.0)
    batches = MetricSeries("loraserve_batches", "", ("state",), [(("queued",), 2.0), (("running",), 1.0)])
    series = cluster.engine.series
    cluster.engine.series = lambda: (*series(), batches)
    async with session(cluster.engine) as api:
        url = str(api.http._base_url)
        told, adapter = await asyncio.gather(shown(modules, url), shown(modules, url, "#/adapter/held"))
    size = told["size"] or ""
    assert size.startswith("Nodes wanted: 4 (of 2 to 6), present: 3. Chosen ")
    assert size.endswith(" ago: fewer would be too busy to answer in time.")
    assert "adapters held 1" in (told["summary"] or "")
    assert "sequences that run" in (told["summary"] or "")
    assert "waiting for their turn 2 running 1" in (told["batches"] or "")
    assert "takes no requests for" in (adapter["adapter"] or "")


async def test_the_page_of_a_coordinator_says_nothing_of_requests(modules: Path) -> None:
    async with open_door() as door:
        url = str(door.http._base_url)
        told, adapter = await asyncio.gather(shown(modules, url), shown(modules, url, "#/adapter/a"))
    assert (told["model"] or "").startswith("coordinator, version ")
    assert told["summary"] == "nodes that serve 1 of 1 adapters 2"
    assert (told["size"], told["batches-card"]) == (None, None), (
        "their number is fixed, and it takes no batches"
    )
    assert "n1 serving" in (told["nodes"] or "")
    assert "Requests under way" not in (adapter["adapter"] or "")
    assert "Latency" not in (adapter["adapter"] or "")
