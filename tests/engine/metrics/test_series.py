"""Series of adapters, placement and gateways: valid, named as gateways read them, and of bounded number."""

from collections.abc import Sequence

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.base.model_card import ModelCard
from engine.catalogue.base import CatalogueEntry
from engine.cluster.control.coordinator_asks import CoordinatorAsks
from engine.cluster.link.link_messages import VERSION, NodeReady, OpenLink
from engine.cluster.router.cluster_client import ClusterClient
from engine.cluster.router.forwarding import Forwarding
from engine.cluster.view import ClusterView, ServedModel
from engine.errors import AdapterBusy, UnknownModel
from engine.metrics.series import MOST_RANKS, MetricSeries, Refusals, census_series, rank_label
from engine.metrics.telemetry import Telemetry
from engine.tokenizer import Tokenizer
from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import StepLoad
from scheduler.cluster.policies import OURS, Setting
from scheduler.cluster.routing.base import NodeLoad
from scheduler.cluster.state import RoutingTable, Share
from tests.engine.cluster.live_nodes import SECURITY, SLO
from tests.fakes.engine_client import Stats
from tests.fakes.tokenizers import byte_tokenizer
from tests.scheduler.cluster.test_routing import MODEL

READY = NodeReady(VERSION, "n", 1, 512, 260, (2,), "w")
Samples = dict[str, list[tuple[dict[str, str], float]]]


def scraped(telemetry: Telemetry, series: Sequence[MetricSeries]) -> Samples:
    """Read a scrape as Prometheus' own parser does."""
    text = telemetry.render(Stats(0), series).decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            found.setdefault(each.name, []).append((dict(each.labels), each.value))
    return found


def router(adapters: int) -> ClusterClient:
    """A router of two nodes that were never reached, which knows so many adapters."""
    refs = [AdapterRef(f"{at:064x}", f"tenant/{at}", 8, ("q_proj",), 1) for at in range(adapters)]
    table = RoutingTable(4, {ref: (Share("n1", 0.75), Share("n2", 0.25)) for ref in refs})
    view = ClusterView({}, {ref.name: CatalogueEntry(ref.name, ref) for ref in refs}, table, True, 3, 4)
    made = OURS.router(Setting(MODEL, SLO, mean_output_tokens=32, mean_prompt_tokens=64))
    forwarding = Forwarding(
        made(np.random.default_rng(0)), OpenLink(VERSION, "r", 1), SECURITY, ServedModel(512, 260, "w")
    )
    model = ModelCard(("base",), "/models/base", 512, 260, (2,))
    tokenizer, telemetry = Tokenizer(byte_tokenizer()), Telemetry(5)
    return ClusterClient(model, tokenizer, telemetry, forwarding, view, CoordinatorAsks(), 64, SLO.ttft_s)


def test_a_router_sums_its_nodes_up_and_tells_what_it_sent_and_refused() -> None:
    client = router(3)
    forwarding = client.forwarding
    for name, waiting in (("n1", 2), ("n2", 1)):
        load = NodeLoad(
            7, StepLoad((), 0), seats=64, kv_tokens=1000, waiting=waiting, kv_used_tokens=300.0 * waiting
        )
        forwarding.ready[name] = READY
        forwarding.router.hear(name, load, 0.0)
    forwarding.counts.sent_to.update({"n1": 5, "n2": 4})
    forwarding.counts.moved, forwarding.counts.streams_moved = 2, 3
    forwarding.counts.refused["overloaded"] = 6
    client.telemetry.started("tenant/1")
    client._outputs.uses.held.hold("tenant/2", 60.0)
    found = scraped(client.telemetry, client.series())
    expected = {
        "vllm:num_requests_running": [({"model_name": "base"}, 11.0)],
        "vllm:num_requests_waiting": [({"model_name": "base"}, 3.0)],
        "vllm:kv_cache_usage_perc": [({"model_name": "base"}, pytest.approx(0.45))],
        "loraserve_requests_forwarded_total": [({"node": "n1"}, 5.0), ({"node": "n2"}, 4.0)],
        "loraserve_requests_moved_total": [({}, 2.0)],
        "loraserve_streams_moved_total": [({}, 3.0)],
        "loraserve_replacements_total": [({}, 3.0)],
        "loraserve_requests_refused_total": [({"reason": "overloaded"}, 6.0)],
        "loraserve_adapters_held": [({}, 1.0)],
        "loraserve_cluster_nodes": [({}, 2.0)],
        "loraserve_cluster_nodes_wanted": [({}, 4.0)],
        "loraserve_adapter_share": [
            ({"adapter": "tenant/1", "rank": "8", "node": "n1"}, 0.75),
            ({"adapter": "tenant/1", "rank": "8", "node": "n2"}, 0.25),
        ],
    }
    assert {name: found[name] for name in expected} == expected
    ((labels, at_s),) = found["vllm:lora_requests_info"]
    assert labels == {"running_lora_adapters": "", "waiting_lora_adapters": "", "max_lora": "128"}
    assert at_s > 1.7e9


def test_ten_thousand_adapters_make_no_longer_a_scrape_than_the_recent_ones() -> None:
    client = router(10_000)
    for at in range(10_000):
        client.telemetry.started(f"tenant/{at}")
    text = client.telemetry.render(Stats(0), client.series()).decode()
    shares = [line for line in text.splitlines() if line.startswith("loraserve_adapter_share{")]
    assert len(shares) == 2 * 5
    assert len(text.splitlines()) < 500


def test_adapters_are_counted_by_tier_and_rank_and_ranks_are_bounded() -> None:
    census = {("device", 8): (2, 100), ("device", 64): (1, 400), ("elsewhere", 8): (5, 250)}
    found = scraped(Telemetry(), census_series(census))
    assert found["loraserve_adapters"] == [
        ({"tier": "device", "rank": "8"}, 2.0),
        ({"tier": "device", "rank": "64"}, 1.0),
        ({"tier": "elsewhere", "rank": "8"}, 5.0),
    ]
    assert sum(value for _, value in found["loraserve_adapter_bytes"]) == 750
    many = {("device", rank): (1, rank) for rank in range(1, 1000)}
    counts, sizes = census_series(many)
    assert len(counts.samples) == len(set(rank_label(range(1, 1000)).values())) <= 11
    assert sum(value for _, value in counts.samples) == 999
    assert sum(value for _, value in sizes.samples) == sum(range(1, 1000))
    assert list(rank_label(range(1, MOST_RANKS + 1)).values()) == list(map(str, range(1, MOST_RANKS + 1)))


def test_refusals_are_counted_by_a_reason_of_few() -> None:
    refusals = Refusals()
    for error in (UnknownModel("a"), UnknownModel("b"), AdapterBusy("c", 2)):
        with pytest.raises(type(error)), refusals.counted():
            raise error
    found = scraped(Telemetry(), [refusals.series({"no_node": 4})])
    counts = {labels["reason"]: count for labels, count in found["loraserve_requests_refused_total"]}
    assert counts == {"adapter_busy": 1.0, "no_node": 4.0, "unknown_model": 2.0}
