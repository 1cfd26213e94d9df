"""The operator's page: its commands work when pasted, and its samples and metrics are those of the program."""

import json
import re
from pathlib import Path

import msgspec

from engine.api import schema
from engine.async_engine import AsyncEngine
from engine.batches.batch_census import BatchCensus
from engine.catalogue.base import ClusterRecord
from engine.cluster.roles.coordinator_series import coordinator_series
from engine.config.access_config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from engine.metrics.request_log import RequestRecord
from engine.metrics.telemetry import Telemetry
from engine.tokenizer import Tokenizer
from tests.docs.pages import read_page
from tests.engine.metrics.test_series import router
from tests.engine.rig import build
from tests.fakes.engine_client import FakeClient
from tests.fakes.tokenizers import byte_tokenizer

PAGE = read_page("docs/operating.md")
ROOT = Path(__file__).parents[2]


def metrics(folder: Path) -> str:
    """What a single server, a router and the coordinator tell."""
    telemetry = Telemetry()
    telemetry.watch_lost_lines(lambda: {"access": 0})
    telemetry.started("a")
    telemetry.finished("a", "error", 1, 1)
    server = AsyncEngine(build(folder).engine, Telemetry(), 4)
    stats = FakeClient(Tokenizer(byte_tokenizer())).stats()
    led = coordinator_series(ClusterRecord(1, 0, 0))
    told = (server.series(), router(3).series(), led, BatchCensus().series(lambda batch: batch))
    return "".join(telemetry.render(stats, each).decode() for each in told)


def test_every_metric_that_is_named_is_there_with_its_labels(tmp_path: Path) -> None:
    named = [span for span in PAGE.spans if span.startswith("loraserve_")]
    told = metrics(tmp_path)
    assert len(named) > 8
    for metric in named:
        name, _, label = metric.rstrip("}").partition("{")
        assert f"# TYPE {name} " in told
        assert re.search(rf"^{name}{{.*{re.escape(label)}.*}} ", told, re.MULTILINE) or not label


def test_the_sample_lines_have_the_fields_that_lines_have() -> None:
    block = next(block for block in PAGE.blocks if '"outcome"' in block)
    audit, access = (json.loads(part) for part in block.split("\n\n"))
    record = RequestRecord("id", "peer", "POST", "/")
    assert (list(audit), list(access)) == (list(record.audit()), list(record.access()))


def test_the_bodies_to_load_and_unload_are_taken_and_name_a_folder_that_is_there() -> None:
    block = next(block for block in PAGE.blocks if "/v1/load_lora_adapter" in block and "curl" in block)
    load, _, unload = re.findall(r"-d '(.*)'", block)
    loaded = msgspec.json.decode(load, type=schema.LoadAdapter)
    assert msgspec.json.decode(unload, type=schema.UnloadAdapter).lora_name == loaded.lora_name
    root = re.search(r"--lora-root (\S+)", PAGE.text)
    assert root is not None
    assert (ROOT / root[1] / loaded.lora_path / "adapter_config.json").is_file()


def test_the_variables_for_keys_are_those_of_the_program() -> None:
    assert {API_KEY_VARIABLE, ADMIN_KEY_VARIABLE} <= set(PAGE.spans)
