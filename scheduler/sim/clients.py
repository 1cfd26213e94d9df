"""Clients of the simulated cluster: they send requests to routers, and what becomes of each is recorded."""

from collections.abc import Iterator, Mapping

import numpy as np

from scheduler.cluster.routing.orders import Refuse
from scheduler.request import Request, SamplingParams
from scheduler.sim.clock import Clock
from scheduler.sim.node import Progress
from scheduler.sim.outcome import History, Record
from scheduler.sim.sim_router import Answer, RefuseClient, SimRouter
from scheduler.sim.workload.prompt import FIRST_TEXT_ID
from scheduler.sim.workload.trace import Arrival


class Clients:
    """Owner of the requests' records; each goes to any of `routers` that is up. A client that is
    refused asks again up to `retries` times."""

    def __init__(
        self,
        clock: Clock,
        history: History,
        routers: Mapping[str, SimRouter],
        rng: np.random.Generator,
        retries: int = 0,
    ) -> None:
        self.records: dict[str, Record] = {}
        self.router_of: dict[str, str] = {}  # of each request that is not answered
        self._clock, self._history, self._rng, self._retries = clock, history, rng, retries
        self._routers = routers

    @property
    def hears(self) -> tuple[Answer, RefuseClient]:
        """Return what routers are to call."""
        return self.answer, self.refuse

    def expect(self, arrivals: Iterator[Arrival]) -> None:
        """Schedule the next arrival, which schedules the one after it."""
        arrival = next(arrivals, None)
        if arrival is not None:
            due_s = max(self._clock.now, arrival.call.arrival_s)
            self._clock.at(due_s, lambda: self._arrive(arrival, arrivals))

    def answer(self, name: str, progress: Progress) -> None:
        """Record what a router tells a client of its request."""
        record = self.records[name]
        assert record.end_s is None, f"{name} is answered twice"
        if progress is Progress.TOKEN:
            record.token(self._clock.now)
        else:
            self._end(name, served=True)

    def refuse(self, name: str, refusal: Refuse) -> None:
        """Record that a router refuses a request; its client may ask again when it was told to."""
        record = self.records[name]
        assert record.end_s is None, f"{name} is answered twice"
        self._end(name, served=False, retry_after_s=refusal.retry_after_s)
        if record.retries < self._retries:
            self._clock.after(refusal.retry_after_s, lambda: self._retry(record))

    def lose(self, name: str) -> None:
        """Record that the connection to the request's router broke."""
        self._end(name, served=False)

    def _arrive(self, arrival: Arrival, rest: Iterator[Arrival]) -> None:
        self.expect(rest)
        self.records[arrival.name] = Record(arrival)
        self._ask(arrival)

    def _retry(self, record: Record) -> None:
        record.retry()
        self._ask(record.arrival)

    def _ask(self, arrival: Arrival) -> None:
        serving = [name for name, router in self._routers.items() if router.up]
        if not serving:
            self._end(arrival.name, served=False)
            return
        router = serving[int(self._rng.integers(len(serving)))]
        self.router_of[arrival.name] = router
        self._routers[router].take(_request(arrival, at=len(self.records)))

    def _end(self, name: str, served: bool, retry_after_s: float | None = None) -> None:
        self.router_of.pop(name, None)
        self.records[name].end(self._clock.now, served, retry_after_s)
        self._history.note(self._clock.now, f"{name} {'served' if served else 'refused'}")


def _request(arrival: Arrival, at: int) -> Request:
    """Make a request of that many tokens, whose own text is no other's."""
    call, own_id = arrival.call, FIRST_TEXT_ID + at
    params = SamplingParams(max_tokens=call.output_tokens, ignore_eos=True, seed=0)
    prompt = arrival.prompt_token_ids(own_id)
    return Request(
        request_id=arrival.name,
        prompt_token_ids=prompt,
        adapter=arrival.adapter,
        params=params,
        eos_token_ids=(),
        arrival_s=call.arrival_s,
        priority=arrival.priority,
        tenant=arrival.tenant,
    )
