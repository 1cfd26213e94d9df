"""Clients of the simulated cluster: they send requests to front doors, and what becomes of each is recorded."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from scheduler.request import Request, SamplingParams
from scheduler.sim.clock import Clock
from scheduler.sim.front_door import FrontDoor
from scheduler.sim.node import Progress
from scheduler.sim.outcome import History, Record
from scheduler.sim.workload.prompt import FIRST_TEXT_ID
from scheduler.sim.workload.trace import Arrival


class Clients:
    """Owner of the requests' records. `front_doors` go by the node's name; `serves` says which take requests."""

    def __init__(
        self,
        clock: Clock,
        history: History,
        front_doors: Mapping[str, FrontDoor],
        serves: Callable[[str], bool],
        rng: np.random.Generator,
    ) -> None:
        self.records: dict[str, Record] = {}
        self.front_door_of: dict[str, str] = {}  # of each request that is not answered
        self._clock, self._history, self._rng = clock, history, rng
        self._front_doors, self._serves = front_doors, serves

    def expect(self, arrivals: Iterator[Arrival]) -> None:
        """Schedule the next arrival, which schedules the one after it."""
        arrival = next(arrivals, None)
        if arrival is not None:
            due_s = max(self._clock.now, arrival.call.arrival_s)
            self._clock.at(due_s, lambda: self._arrive(arrival, arrivals))

    def answer(self, name: str, progress: Progress) -> None:
        """Record what a front door tells a client of its request."""
        record = self.records[name]
        assert record.end_s is None, f"{name} is answered twice"
        if progress is Progress.FIRST_TOKEN:
            if record.first_s is None:
                record.token(self._clock.now)
        else:
            del self.front_door_of[name]
            self._end(name, served=progress is Progress.DONE)

    def lose(self, name: str) -> None:
        """Record that the connection to the request's front door broke."""
        del self.front_door_of[name]
        self._end(name, served=False)

    def _arrive(self, arrival: Arrival, rest: Iterator[Arrival]) -> None:
        self.expect(rest)
        self.records[arrival.name] = Record(arrival)
        serving = [name for name in self._front_doors if self._serves(name)]
        if not serving:
            self._end(arrival.name, served=False)
            return
        home = serving[int(self._rng.integers(len(serving)))]
        self.front_door_of[arrival.name] = home
        self._front_doors[home].take(_request(arrival, at=len(self.records)))

    def _end(self, name: str, served: bool) -> None:
        self.records[name].end(self._clock.now, served)
        self._history.note(self._clock.now, f"{name} {'served' if served else 'refused'}")


def _request(arrival: Arrival, at: int) -> Request:
    """Make a request of that many tokens, whose own text is no other's."""
    call, own_id = arrival.call, FIRST_TEXT_ID + at
    params = SamplingParams(max_tokens=call.output_tokens, ignore_eos=True, seed=0)
    prompt = arrival.prompt_token_ids(own_id)
    return Request(arrival.name, prompt, arrival.adapter, params, (), call.arrival_s)
