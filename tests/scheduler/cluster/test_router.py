"""A router answers each request exactly once, sends what would be in time, and moves what a lost node had."""

from dataclasses import dataclass, field, fields
from operator import eq
from types import MappingProxyType

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.activation import NEVER
from scheduler.cluster.cost.model import AdapterLoad, Kernel, StepLoad
from scheduler.cluster.cost.pace import Pace
from scheduler.cluster.cost.profile import Slo
from scheduler.cluster.policies import OURS, Setting
from scheduler.cluster.routing.base import NodeLoad, RouteRequest
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.routing.load_view import LoadView
from scheduler.cluster.routing.orders import Offer, Order, RefusalReason, Refuse, Send
from scheduler.cluster.routing.predicted_cost import PredictedCostRouting
from scheduler.cluster.routing.prefix_index import CHUNK_TOKENS, PrefixIndex, prefix_chunks
from scheduler.cluster.routing.router import Router, RouterOptions
from scheduler.cluster.routing.slo_admission import RetryTimes, SloAdmission
from scheduler.cluster.state import RoutingTable, Share
from tests.chance import examples
from tests.scheduler.cluster.lossy import FORECAST, adapter

SLO = Slo(2.0, 0.1)
A, B = adapter("a", 8), adapter("b", 64)
TABLE = RoutingTable(1, MappingProxyType({A: (Share("x", 1.0),), B: (Share("y", 1.0),)}))


def load(
    number: int, prompt_tokens: int = 0, decoding: int = 0, heard: int = 0, draining: bool = False
) -> NodeLoad:
    work = StepLoad((AdapterLoad(8, prompt_tokens, decoding),), decoding * 500)
    return NodeLoad(decoding, work, number=number, heard=heard, draining=draining)


FULL = 100_000  # prompt tokens that take longer than the SLO to read


@dataclass
class Rig:
    """A router of nodes x and y."""

    admits: bool = True
    now: float = 0.0
    number: int = 0
    router: Router = field(init=False)

    def __post_init__(self) -> None:
        self.router = Router(
            PredictedCostRouting(CostEstimator(FORECAST), SLO),
            SloAdmission(CostEstimator(FORECAST), SLO) if self.admits else None,
            LoadView(),
            np.random.default_rng(0),
        )
        self.router.adopt(TABLE)

    def hear(self, node: str, prompt_tokens: int = 0, draining: bool = False) -> list[Order]:
        self.number += 1
        self.router.hear(node, load(self.number, prompt_tokens, heard=1 << 30, draining=draining), self.now)
        return self.router.advance(self.now)

    def offer(self, name: str, ref: object = A, **more: object) -> list[Order]:
        assert ref is A or ref is B
        return self.router.offer(Offer(name, ref, 500, **more), self.now)  # type: ignore[arg-type]

    def wait(self, seconds: float) -> list[Order]:
        self.now += seconds
        return self.router.advance(self.now)


def _sent(orders: list[Order]) -> list[tuple[str, int, str]]:
    return [(each.request_id, each.attempt, each.node) for each in orders if isinstance(each, Send)]


def _refused(orders: list[Order]) -> list[tuple[str, RefusalReason]]:
    return [(each.request_id, each.reason) for each in orders if isinstance(each, Refuse)]


def test_a_request_goes_to_its_home_and_ends_once() -> None:
    rig = Rig()
    rig.hear("x")
    rig.hear("y")
    assert _sent(rig.offer("r")) == [("r", 1, "x")]
    assert rig.router.drew("r", 1)
    assert not rig.router.drew("r", 2)
    assert rig.router.ended("r", 1)
    assert not rig.router.ended("r", 1)
    assert "r" not in rig.router


def test_what_a_lost_node_had_moves_with_its_tokens() -> None:
    rig = Rig()
    rig.hear("x")
    rig.hear("y")
    rig.offer("r")
    rig.router.drew("r", 1, tokens=7)
    rig.router.lose("x", rig.now)
    assert _sent(rig.wait(0.0)) == [("r", 2, "y")]
    assert rig.router.drawn_tokens("r") == 7
    assert not rig.router.drew("r", 1), "the earlier attempt is not heard"
    assert rig.router.drew("r", 2)


def test_a_stream_that_moves_waits_for_no_slo_and_goes_before_what_has_not_begun() -> None:
    rig = Rig()
    rig.hear("x")
    rig.offer("r")
    rig.router.lose("x", rig.now)
    assert _sent(rig.wait(5.0)) == []
    assert _sent(rig.offer("new")) == []
    assert [name for name, *_ in _sent(rig.hear("y", FULL))] == ["r"]


def test_a_request_waits_while_no_node_is_in_time_and_goes_when_one_is() -> None:
    rig = Rig()
    rig.hear("x", FULL)
    rig.hear("y", FULL)
    assert rig.offer("r") == []
    assert rig.router.waiting == 1
    rig.now = 0.5
    assert _sent(rig.hear("x")) == [("r", 1, "x")]


def test_what_no_node_can_serve_in_time_any_more_is_refused_with_a_time_to_come_again() -> None:
    rig = Rig()
    rig.hear("x", FULL)
    rig.offer("r")
    wake_s = rig.router.wake_s()
    assert 0 < wake_s < SLO.ttft_s
    assert rig.wait(wake_s - 0.01) == []
    rig.hear("x", FULL)
    [refusal] = rig.wait(0.02)
    assert isinstance(refusal, Refuse)
    assert refusal.reason is RefusalReason.OVERLOADED
    assert refusal.retry_after_s >= 1.0
    assert rig.router.wake_s() == float("inf")


def test_in_overload_a_request_is_refused_at_once_if_too_much_waits_before_it() -> None:
    rig = Rig()
    for at in range(30):
        rig.now += 0.1
        rig.hear("x")
        assert _sent(rig.offer(f"sent-{at}", tenant="greedy"))
    rig.hear("x", FULL)
    answers = [rig.offer(f"r{at}", tenant="greedy") for at in range(200)]
    refused = [bool(_refused(orders)) for orders in answers]
    assert not refused[0]
    assert refused[-1]
    assert refused == sorted(refused), "once one is refused, all after it are"
    assert rig.offer("modest", tenant="modest") == [], "the other tenant's turn comes soon"


def test_no_node_at_all() -> None:
    rig = Rig()
    rig.offer("r")
    assert _refused(rig.wait(SLO.ttft_s)) == [("r", RefusalReason.NO_NODE)]
    open_rig = Rig(admits=False)
    open_rig.offer("r")
    assert open_rig.wait(RouterOptions().patience_s - 1) == []
    assert _refused(open_rig.wait(2.0)) == [("r", RefusalReason.NO_NODE)]


def test_a_node_that_drains_or_is_silent_is_sent_nothing() -> None:
    rig = Rig()
    rig.hear("x", draining=True)
    rig.hear("y")
    assert _sent(rig.offer("r")) == [("r", 1, "y")]
    rig.now = 10.0
    assert rig.offer("late") == [], "y has been silent"
    assert _sent(rig.hear("y")) == [("late", 1, "y")]


def test_a_request_that_nodes_give_back_is_sent_again_after_a_pause_and_then_fails() -> None:
    rig = Rig(admits=False)
    attempts = RouterOptions().attempts
    rig.hear("x")
    rig.offer("r")
    for attempt in range(1, attempts):
        rig.router.refused("r", attempt, rig.now)
        assert _sent(rig.wait(0.1)) == []
        rig.hear("x")
        assert _sent(rig.wait(0.3)) == [("r", attempt + 1, "x")]
    rig.router.refused("r", attempts, rig.now)
    assert _refused(rig.wait(1.0)) == [("r", RefusalReason.FAILED)]


def _lose(rig: Rig, request_id: str, attempt: int, tokens: int) -> list[Order]:
    """Let a node draw tokens and be lost, and come back."""
    if tokens:
        assert rig.router.drew(request_id, attempt, tokens)
    rig.router.lose("x", rig.now)
    return rig.hear("x")


def test_a_stream_that_goes_on_outlives_more_lost_nodes_than_it_has_attempts() -> None:
    rig, options = Rig(), RouterOptions()
    rig.hear("x")
    rig.offer("r")
    for attempt in range(1, options.moves + 1):
        assert _sent(_lose(rig, "r", attempt, 1)) == [("r", attempt + 1, "x")]
    for attempt in range(options.moves + 1, options.moves + options.attempts):
        assert _sent(_lose(rig, "r", attempt, 0)) == [("r", attempt + 1, "x")]
    assert _refused(_lose(rig, "r", options.moves + options.attempts, 0)) == [("r", RefusalReason.FAILED)]


def test_a_request_that_ends_its_nodes_at_the_first_token_fails_in_bounded_time() -> None:
    rig, options = Rig(), RouterOptions()
    rig.hear("x")
    rig.offer("r")
    last = options.moves + options.attempts
    for attempt in range(1, last):
        assert _sent(_lose(rig, "r", attempt, 1)) == [("r", attempt + 1, "x")]
    assert _refused(_lose(rig, "r", last, 1)) == [("r", RefusalReason.FAILED)]


@settings(deadline=None, max_examples=examples(100))
@given(st.lists(st.integers(0, 2), max_size=60))
def test_attempts_count_but_those_that_drew_tokens_on_a_node_that_was_lost(drawn: list[int]) -> None:
    rig, options = Rig(), RouterOptions()
    rig.hear("x")
    rig.offer("r")
    for attempt, tokens in enumerate(drawn, 1):
        orders = _lose(rig, "r", attempt, tokens)
        moves = min(options.moves, sum(each > 0 for each in drawn[:attempt]))
        if attempt - moves >= options.attempts:
            assert _refused(orders) == [("r", RefusalReason.FAILED)]
            return
        assert _sent(orders) == [("r", attempt + 1, "x")]
        assert rig.router.drawn_tokens("r") == sum(drawn[:attempt])


def test_a_tenant_of_more_weight_has_more_turns_at_a_router_that_a_policy_makes() -> None:
    firsts: dict[float, int] = {}
    for weight in (1.0, 8.0):
        setting = Setting(FORECAST.model, SLO, weights={"heavy": weight})
        router = OURS.router(setting)(np.random.default_rng(0))
        router.adopt(TABLE)
        router.hear("x", load(1, FULL), 0.0)
        for at in range(12):
            tenant = ("light", "heavy")[at % 2]
            assert not router.offer(Offer(f"{tenant}{at}", A, 10, tenant=tenant), 0.0)
        router.hear("x", load(2), 0.1)
        order = [each.request_id for each in router.advance(0.1) if isinstance(each, Send)]
        firsts[weight] = sum(name.startswith("heavy") for name in order[:6])
    assert firsts == {1.0: 3, 8.0: 5}


def test_one_that_has_not_begun_is_not_sent_again_too_late() -> None:
    rig = Rig()
    rig.hear("x")
    rig.offer("r")
    rig.router.refused("r", 1, rig.now)
    rig.now = 1.0
    assert _sent(rig.hear("x", FULL)) == []
    rig.now = 2.5
    assert _refused(rig.hear("x")) == [("r", RefusalReason.OVERLOADED)]


def test_one_that_came_back_while_no_node_is_there_is_refused_when_its_time_is_over() -> None:
    rig = Rig()
    rig.hear("x")
    rig.offer("r")
    rig.router.refused("r", 1, rig.now)
    rig.router.lose("x", rig.now)
    orders: list[Order] = []
    while not orders:
        wake_s = rig.router.wake_s()
        assert wake_s > rig.now
        orders = rig.wait(wake_s - rig.now)
    assert _refused(orders) == [("r", RefusalReason.NO_NODE)]
    assert rig.now <= SLO.ttft_s


def test_a_client_that_goes_is_forgotten() -> None:
    rig = Rig()
    rig.hear("x", FULL)
    rig.offer("r")
    rig.router.cancel("r")
    assert rig.router.waiting == 0
    assert rig.hear("x") == []


def test_an_older_table_is_not_adopted() -> None:
    rig = Rig()
    rig.router.adopt(RoutingTable(0, MappingProxyType({})))
    assert rig.router.table is TABLE


def test_a_view_counts_what_was_sent_until_the_node_has_heard_of_it() -> None:
    view = LoadView(routers=2)
    view.hear("x", load(1), 0.0)
    numbers = [view.sent("x", RouteRequest(A, 500)) for _ in range(3)]
    assert numbers == [1, 2, 3]
    assert view.loads["x"].requests == 6, "the other router has sent as many"
    view.hear("x", load(2, heard=2), 0.1)
    assert view.loads["x"].requests == 2
    view.hear("x", load(1), 0.2)
    assert view.loads["x"].requests == 2, "what came late is not heard"
    view.lose("x")
    assert "x" not in view.loads
    view.hear("x", load(1), 0.3)
    assert view.sent("x", RouteRequest(A, 500)) == 4, "numbers go on"


def test_retry_times_grow_with_the_overload_and_are_spread() -> None:
    times = RetryTimes(np.random.default_rng(0))
    early = [times.after_s(10.0) for _ in range(50)]
    assert min(early) >= 1.0
    assert max(early) <= 1.5
    assert len(set(early)) > 40
    later = [times.after_s(10.0 + at) for at in range(20)]
    assert 19.0 <= later[-1] <= 1.5 * 19.0
    assert times.after_s(100.0) <= 1.5, "that overload was over"


def test_prefixes_are_believed_where_they_were_sent_last() -> None:
    index = PrefixIndex(node_chunks=3)
    base = tuple(range(4 * CHUNK_TOKENS))
    longer = prefix_chunks("d", base)
    assert prefix_chunks("d", base[: 2 * CHUNK_TOKENS + 9]) == longer[:2]
    assert prefix_chunks("e", base)[0] != longer[0], "adapters share nothing"
    index.sent("x", longer[:2])
    cached = index.cached_tokens(longer)
    assert (cached.get("x", 0), cached.get("y", 0)) == (2 * CHUNK_TOKENS, 0)
    index.sent("x", longer)
    assert index.cached_tokens(longer)["x"] == 3 * CHUNK_TOKENS, "the last chunks are forgotten first"
    index.lose("x")
    assert index.cached_tokens(longer).get("x", 0) == 0


step = st.tuples(
    st.sampled_from(
        ["offer", "offer", "hear", "full", "drain", "lose", "token", "end", "refuse", "wait", "cancel"]
    ),
    st.integers(0, 1000),
)


@settings(deadline=None, max_examples=examples(150))
@given(st.lists(step, max_size=80), st.booleans())
def test_whatever_happens_each_request_is_answered_once(steps: list[tuple[str, int]], admits: bool) -> None:
    rig = Rig(admits=admits)
    at_node: dict[str, Send] = {}  # the attempt that counts
    answered: dict[str, str] = {}
    closed = {"x", "y"}

    def see(orders: list[Order]) -> None:
        for order in orders:
            assert order.request_id not in answered, "an order for what has ended"
            if isinstance(order, Send):
                before = at_node.get(order.request_id)
                assert order.node not in closed
                assert before is None or order.attempt > before.attempt
                at_node[order.request_id] = order
            else:
                answered[order.request_id] = "refused"
                at_node.pop(order.request_id, None)

    def hear(node: str, tokens: int = 0, draining: bool = False) -> None:
        closed.discard(node)
        if draining:
            closed.add(node)
        see(rig.hear(node, tokens, draining))

    offered = 0
    for kind, number in steps:
        node, some = "xy"[number % 2], list(at_node.values())
        send = some[number % len(some)] if some else None
        match kind:
            case "offer":
                offered += 1
                see(rig.offer(f"r{offered}", (A, B)[number % 2], tenant=f"t{number % 3}"))
            case "hear":
                hear(node)
            case "full":
                hear(node, FULL)
            case "drain":
                hear(node, draining=True)
            case "lose":
                closed.add(node)
                rig.router.lose(node, rig.now)
                see(rig.router.advance(rig.now))
            case "wait":
                see(rig.wait(number / 500))
                if number > 700:
                    closed = {"x", "y"}  # may be silent for too long
                    hear("x")
            case "token" if send:
                assert rig.router.drew(send.request_id, send.attempt) == rig.router.is_waiting_for(
                    send.request_id, send.node, send.attempt
                )
            case "end" if send:
                if rig.router.ended(send.request_id, send.attempt):
                    answered[send.request_id] = "served"
                    del at_node[send.request_id]
            case "refuse" if send:
                rig.router.refused(send.request_id, send.attempt, rig.now)
            case "cancel" if send:
                rig.router.cancel(send.request_id)
                answered[send.request_id] = "cancelled"
                del at_node[send.request_id]
            case _:
                pass
        see(rig.router.advance(rig.now))
        assert rig.router.wake_s() > rig.now, "it asks to be called now, and does nothing then"
    _answer_all(rig, at_node, answered, see)
    assert len(answered) == offered
    assert not rig.router.pending()


def _answer_all(rig: Rig, at_node: dict[str, Send], answered: dict[str, str], see: object) -> None:
    """Let idle nodes answer all that they are sent."""
    assert callable(see)
    for _ in range(20):
        rig.now += 0.5
        for node in ("x", "y"):
            rig.number += 1
            rig.router.hear(node, load(rig.number, heard=1 << 30), rig.now)
        orders = rig.router.advance(rig.now)
        for order in orders:
            if isinstance(order, Send):
                at_node[order.request_id] = order
            else:
                answered[order.request_id] = "refused"
        for name, send in list(at_node.items()):
            if rig.router.ended(name, send.attempt):
                answered[name] = "served"
                del at_node[name]


def test_a_load_with_more_on_it_is_the_same_in_all_else() -> None:
    told = NodeLoad(
        requests=3,
        work=StepLoad((AdapterLoad(8, 100, 2),), 900, 40),
        adapters=frozenset([A.digest]),
        room_bytes=1e12,
        number=7,
        heard=5,
        draining=True,
        step_rows=600,
        seats=64,
        kv_tokens=80_000,
        kernel=Kernel.MULTI_RANK,
        pace=Pace(2.0, 1.5, 0.5),
    )
    more = told.plus(RouteRequest(B, 400), times=2)
    changed = {each.name for each in fields(NodeLoad) if getattr(more, each.name) != getattr(told, each.name)}
    assert changed == {"requests", "work", "adapters", "room_bytes"}
    assert (more.requests, more.adapters) == (5, {A.digest, B.digest})
    assert (more.work.context_tokens, more.work.prompt_pairs) == (900, 40)


def test_an_activated_lora_shares_with_the_base_what_stands_before_its_invocation() -> None:
    prompt = list(range(4 * CHUNK_TOKENS))
    base = prefix_chunks("", prompt)
    begins = {at: prefix_chunks("d", prompt, at) for at in (1, 2 * CHUNK_TOKENS, 2 * CHUNK_TOKENS + 1, NEVER)}
    shared = {at: sum(map(eq, base, chunks)) for at, chunks in begins.items()}
    assert shared == {1: 0, 2 * CHUNK_TOKENS: 2, 2 * CHUNK_TOKENS + 1: 2, NEVER: 4}
    distinct = {chunk for chunks in begins.values() for chunk in chunks}
    assert len(distinct) == 4 + 4 + 2 + 2, (
        "chunks that an adapter acts on are of one adapter and one position"
    )
