"""Accounts of tenants: what is taken, given back, refused and told, on a clock of the test's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BeyondLimit, RateLimited, UnknownModel
from engine.tenants.accounts import TenantAccounts, duration
from engine.tenants.tenant import Tenant, TenantLimits
from lora.adapter import BASE
from scheduler.request import InvalidParameter, Origin, Request, SamplingParams


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Desk:
    """Accounts, asked as an engine asks them."""

    def __init__(self, *tenants: Tenant, longest: int = 100, clock: Clock | None = None) -> None:
        self.clock, self.count = clock or Clock(), 0
        self.accounts = TenantAccounts(("base", "alias"), longest, self.clock)
        self.accounts.adopt(tenants)

    def begin(
        self, tenant: str = "a", model: str = "x", prompt: int = 10, tokens: int | None = 10, n: int = 1, many: int = 1
    ) -> list[str]:  # fmt: skip
        params, ids = SamplingParams(max_tokens=tokens, n=n), (7,) * prompt
        self.accounts.check(tenant, model, [ids] * many, params)
        begun: list[str] = []
        for _ in range(many):
            self.count += 1
            request = Request(str(self.count), ids, BASE, params, (), 0.0, tenant=tenant)
            self.accounts.began(request, model)
            begun.append(request.request_id)
        return begun

    def end(self, name: str, used: int, was_refused: bool = False) -> None:
        self.accounts.ended(name, used, was_refused)

    def told(self, kind: str, tenant: str = "a", model: str = "x") -> tuple[str, str, str]:
        headers = self.accounts.headers(tenant, model)
        limit, remaining, reset = (
            headers[f"x-ratelimit-{word}-{kind}"] for word in ("limit", "remaining", "reset")
        )
        return limit, remaining, reset


def tenant(name: str = "a", **limits: int) -> Tenant:
    return Tenant(name, limits=TenantLimits(**limits))


def test_requests_flow_in_over_a_minute_and_who_waits_as_told_gets_in() -> None:
    desk = Desk(tenant(requests_per_minute=2))
    desk.begin()
    assert desk.told("requests") == ("2", "1", "30s")
    desk.begin()
    for _ in range(2):
        with pytest.raises(RateLimited, match=r"used its 2 requests per minute: retry in 30 s") as refusal:
            desk.begin()
        desk.clock.now_s += refusal.value.retry_after_s
        desk.begin()


def test_tokens_are_reserved_and_what_was_not_used_is_given_back() -> None:
    desk = Desk(tenant(tokens_per_minute=100))
    (first,) = desk.begin(prompt=10, tokens=30, n=2)
    assert desk.told("tokens") == ("100", "30", "42s")
    with pytest.raises(RateLimited):
        desk.begin(prompt=20, tokens=20)
    desk.end(first, 15)
    assert desk.told("tokens") == ("100", "85", "9s")
    desk.begin(prompt=20, tokens=20)


def test_a_request_that_no_node_took_costs_nothing() -> None:
    desk = Desk(tenant(requests_per_minute=1, tokens_per_minute=100, concurrent=1))
    (first,) = desk.begin()
    desk.end(first, 10, was_refused=True)
    desk.begin()


def test_what_could_never_be_is_refused_for_good() -> None:
    desk = Desk(tenant(tokens_per_minute=50, concurrent=2, requests_per_minute=3))
    for asked in ({"tokens": 41}, {"n": 5}, {"many": 3}, {"prompt": 51, "tokens": None}):
        with pytest.raises(BeyondLimit):
            desk.begin(**asked)
    desk.begin(tokens=40)


def test_an_answer_without_a_bound_reserves_at_most_what_there_is_and_is_charged_for_what_it_was() -> None:
    desk = Desk(tenant(tokens_per_minute=50), longest=1000)
    (first,) = desk.begin(tokens=None)
    assert desk.told("tokens")[1] == "0"
    desk.end(first, 80)
    with pytest.raises(RateLimited) as refusal:
        desk.begin(prompt=5, tokens=5)
    assert refusal.value.retry_after_s == 48  # 30 of debt and 10 at 50 a minute
    desk.clock.now_s += 48
    desk.begin(prompt=5, tokens=5)


def test_only_so_many_run_at_once() -> None:
    desk = Desk(tenant(concurrent=2))
    first, _ = desk.begin(many=2)
    with pytest.raises(RateLimited, match="2 requests at once"):
        desk.begin()
    desk.end(first, 0)
    desk.begin()


def test_an_adapter_s_limits_are_its_own_and_the_tenant_s_hold_too() -> None:
    limits = (("x*", TenantLimits(requests_per_minute=1)), ("*", TenantLimits(requests_per_minute=2)))
    desk = Desk(Tenant("a", limits=TenantLimits(requests_per_minute=4), adapter_limits=limits), tenant("b"))
    desk.begin(model="x1")
    with pytest.raises(RateLimited):
        desk.begin(model="x1")
    desk.begin(model="x2")
    desk.begin(model="base")
    assert desk.told("requests", model="base")[:2] == ("4", "1")
    desk.begin(model="base")
    with pytest.raises(RateLimited):
        desk.begin(model="y")
    desk.begin(tenant="b", model="x1")
    assert desk.accounts.headers("b", "x1") == desk.accounts.headers("nobody", "x1") == {}


def test_other_limits_hold_from_when_they_are_adopted_and_what_was_used_stays_used() -> None:
    desk = Desk(tenant(requests_per_minute=4))
    (first, *_) = desk.begin(many=3)
    desk.accounts.adopt([tenant(requests_per_minute=3, concurrent=3)])
    assert desk.told("requests")[:2] == ("3", "0")
    desk.clock.now_s += 60
    with pytest.raises(RateLimited, match="at once"):
        desk.begin()
    desk.end(first, 0)
    desk.begin()
    desk.accounts.adopt([])
    desk.begin(many=9)


def test_what_a_tenant_may_not_use_is_as_if_it_were_not_there() -> None:
    desk = Desk(Tenant("a", adapters=("a-*",), base=False))
    for model in ("base", "alias", "b-1"):
        with pytest.raises(UnknownModel) as refusal:
            desk.accounts.check_access(Origin("a"), model)
        assert str(refusal.value) == str(UnknownModel(model))
    assert desk.accounts.check_access(Origin("a"), "a-1") == 0
    assert desk.accounts.check_access(Origin(""), "base") == 0


def test_no_request_goes_before_its_tenant_s_class() -> None:
    desk = Desk(Tenant("a", priority=5))
    asked = [desk.accounts.check_access(Origin("a", each), "x") for each in (0, 1, 1000)]
    assert asked == [5, 6, 1000]
    assert desk.accounts.check_access(Origin("other", 1), "x") == 1
    with pytest.raises(InvalidParameter, match="priority"):
        desk.accounts.check_access(Origin("a", -1), "x")


def test_names_come_and_go_and_few_meters_stay() -> None:
    desk = Desk(Tenant("a", adapter_limits=(("*", TenantLimits(requests_per_minute=60)),)))
    for number in range(5_000):
        (name,) = desk.begin(model=f"m{number}")
        desk.end(name, 0)
        desk.clock.now_s += 1
        desk.accounts.headers("a", f"unknown-{number}")
    assert len(desk.accounts._meters) <= 4096


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 20), st.booleans()),
        max_size=30,
    )
)
def test_no_minute_has_more_than_the_limit_flowed_in_and_everything_is_given_back(
    asked: list[tuple[int, int, float, int, bool]],
) -> None:
    """After each request has ended, what is left is the capacity, less what was used, plus what flowed in since."""
    desk, level = Desk(tenant(tokens_per_minute=60, concurrent=3)), 60.0
    for prompt, tokens, part, wait_s, cancelled in asked:
        try:
            (name,) = desk.begin(prompt=prompt, tokens=tokens)
        except RateLimited as refusal:
            assert level < prompt + tokens
            desk.clock.now_s += refusal.retry_after_s
            level = min(60.0, level + refusal.retry_after_s)
            (name,) = desk.begin(prompt=prompt, tokens=tokens)
        used = prompt + int(part * tokens) * (not cancelled)
        desk.end(name, used)
        level = min(60.0, level - used)
        desk.clock.now_s += wait_s
        level = min(60.0, level + wait_s)
        assert abs(int(desk.told("tokens")[1]) - level) < 1.001


def test_durations_are_written_as_openai_does() -> None:
    assert [duration(each) for each in (0.0, 0.0001, 0.017, 1.0, 1.5, 59.9996, 360.0, 90.25)] == [
        "0ms", "1ms", "17ms", "1s", "1.5s", "1m0s", "6m0s", "1m30.25s",
    ]  # fmt: skip
