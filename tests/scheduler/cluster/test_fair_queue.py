"""What waits at the door goes in a fair order, expires in time, and is never lost or served twice."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cluster.routing.fair_queue import FairQueue, QueuedRequest
from tests.chance import examples


def _request(
    at: int, tenant: str, adapter: str = "a", work_s: float = 1.0, priority: int = 0
) -> QueuedRequest:
    return QueuedRequest(f"r{at}", tenant, adapter, work_s, 100.0 + at, priority)


def _served(queue: FairQueue, count: int) -> list[QueuedRequest]:
    """Serve `count` requests, one call each."""
    served: list[QueuedRequest] = []
    for _ in range(count):
        room = [None]

        def send(request: QueuedRequest, room: list[None] = room) -> bool:
            if room:
                served.append(request)
                room.clear()
                return True
            return False

        queue.serve(send, most_tries=64)
    return served


def test_a_tenant_with_many_requests_does_not_delay_one_with_few() -> None:
    queue = FairQueue()
    for at in range(50):
        queue.add(_request(at, "many"))
    for at in range(50, 53):
        queue.add(_request(at, "few"))
    first = [request.tenant for request in _served(queue, 6)]
    assert first.count("few") == 3


@pytest.mark.parametrize("later", [False, True])
def test_tenants_are_served_by_weight_and_work(later: bool) -> None:
    queue = FairQueue({"light": 3.0} if later else {"heavy": 3.0})
    if later:
        queue.weigh({"heavy": 3.0})
    for at in range(200):
        queue.add(_request(at, "heavy", work_s=1.0))
        queue.add(_request(1000 + at, "light", work_s=0.5))
    work = Counter[str]()
    for request in _served(queue, 120):
        work[request.tenant] += int(request.work_s * 2)
    assert 2.7 < work["heavy"] / work["light"] < 3.3


def test_adapters_of_one_tenant_take_turns_and_each_keeps_its_order() -> None:
    queue = FairQueue()
    for at in range(10):
        queue.add(_request(at, "t", "often"))
    queue.add(_request(10, "t", "seldom"))
    served = _served(queue, 3)
    assert "seldom" in [request.adapter for request in served]
    often = [request.request_id for request in served if request.adapter == "often"]
    assert often == ["r0", "r1"]


def test_a_lower_priority_waits_for_all_of_a_higher_one() -> None:
    queue = FairQueue()
    queue.add(_request(0, "a", priority=1))
    queue.add(_request(1, "b", priority=0))
    queue.add(_request(2, "a", priority=-1))
    assert [request.request_id for request in _served(queue, 3)] == ["r2", "r1", "r0"]


def test_an_adapter_that_cannot_be_sent_holds_nobody_up() -> None:
    queue = FairQueue()
    queue.add(_request(0, "t", "cold"))
    queue.add(_request(1, "t", "cold"))
    queue.add(_request(2, "t", "warm"))
    sent: list[str] = []

    def send(request: QueuedRequest) -> bool:
        sent.append(request.request_id)
        return request.adapter == "warm"

    queue.serve(send, most_tries=64)
    assert sent == ["r0", "r2"], "the second of the cold adapter is not offered"
    assert "r2" not in queue
    assert "r0" in queue


def test_who_was_idle_saves_no_turns_up() -> None:
    queue = FairQueue()
    for at in range(100):
        queue.add(_request(at, "busy"))
    _served(queue, 60)
    for at in range(100, 140):
        queue.add(_request(at, "late"))
    served = Counter(request.tenant for request in _served(queue, 20))
    assert served["busy"] == served["late"] == 10


def test_the_work_before_a_request_is_that_of_its_turns() -> None:
    queue = FairQueue()
    for at in range(40):
        queue.add(_request(at, "many"))
    assert queue.work_before_s(_request(90, "many")) == 40
    assert queue.work_before_s(_request(91, "few")) == 1
    assert queue.work_before_s(_request(92, "few", priority=1)) == 40
    assert queue.work_before_s(_request(93, "few", priority=-1)) == 0


step = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(-1, 1)),
    st.tuples(st.just("serve"), st.integers(0, 5), st.sampled_from("xyz"), st.just(0)),
    st.tuples(st.just("remove"), st.integers(0, 60), st.just(""), st.just(0)),
    st.tuples(st.just("expire"), st.integers(0, 60), st.just(""), st.just(0)),
)


@settings(deadline=None, max_examples=examples(150))
@given(st.lists(step, max_size=60))
def test_each_request_leaves_once_and_in_the_order_of_its_adapter(
    steps: list[tuple[str, object, str, int]],
) -> None:
    """Against a plain dictionary of what waits."""
    queue, waiting, added = FairQueue(), dict[str, QueuedRequest](), 0
    for kind, what, adapter, priority in steps:
        match kind, what:
            case "add", str():
                request = _request(added, what, adapter, 0.5 + added % 3, priority)
                added += 1
                queue.add(request)
                waiting[request.request_id] = request
            case "remove", int():
                assert queue.remove(f"r{what}") == waiting.pop(f"r{what}", None)
            case "expire", int():
                gone = [request.request_id for request in queue.expired(100.0 + what)]
                assert gone == sorted(gone, key=lambda name: waiting[name].expires_s)
                assert set(gone) == {name for name, each in waiting.items() if each.expires_s <= 100 + what}
                for name in gone:
                    del waiting[name]
            case _, int():
                _serve(queue, waiting, what, adapter)
            case _:
                raise AssertionError(kind)
        assert len(queue) == len(waiting)
        assert all(name in queue for name in waiting)
        assert queue.next_expiry_s == min((each.expires_s for each in waiting.values()), default=float("inf"))


def _serve(queue: FairQueue, waiting: dict[str, QueuedRequest], room: int, blocked: str) -> None:
    """Serve up to `room` requests of other adapters than `blocked`; whatever has room goes."""
    sent: list[QueuedRequest] = []

    def send(request: QueuedRequest) -> bool:
        if len(sent) < room and request.adapter != blocked:
            sent.append(request)
            return True
        return False

    queue.serve(send, most_tries=1000)
    free = [each for each in waiting.values() if each.adapter != blocked]
    assert len(sent) == min(room, len(free)), "what could be sent is sent"
    for request in sent:
        mine = [
            each
            for each in waiting.values()
            if (each.tenant, each.adapter, each.priority)
            == (request.tenant, request.adapter, request.priority)
        ]
        assert mine[0] is request, "requests of one adapter go in the order in which they came"
        del waiting[request.request_id]
