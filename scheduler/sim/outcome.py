"""What a simulated run came to: its history, a record for each request, and the figures that papers print."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from scheduler.cluster.cost.profile import Slo
from scheduler.sim.workload.trace import Arrival


@dataclass(slots=True)
class History:
    """What happened, as lines of text; only their digest is kept unless `keep`."""

    keep: bool = False
    lines: list[str] = field(default_factory=list[str])
    _hash: blake2b = field(default_factory=blake2b)

    def note(self, now: float, what: str) -> None:
        """Add one line."""
        line = f"{now!r} {what}\n"
        self._hash.update(line.encode())
        if self.keep:
            self.lines.append(line)

    def digest(self) -> str:
        """Return the digest of all lines."""
        return self._hash.hexdigest()


@dataclass(slots=True)
class Record:
    """One request's fate: when its tokens came and when it ended, and whether it was served.

    Where it was refused `refused_retry_after_s` is what the client was told, None for nothing. A client that asks
    again then counts in `retries`, and in `broken_promises` if it is refused once more.
    """

    arrival: Arrival
    token_times: "array[float]" = field(default_factory=lambda: array("d"))
    end_s: float | None = None
    served: bool = False
    refused_retry_after_s: float | None = None
    retries: int = 0
    broken_promises: int = 0

    def token(self, now: float) -> None:
        """Note that a token reached the client."""
        self.token_times.append(now)

    def end(self, now: float, served: bool, retry_after_s: float | None = None) -> None:
        """Note that the request ended, and after how many seconds a client that was refused may ask again."""
        self.end_s, self.served = now, served
        if not served:
            self.broken_promises += self.refused_retry_after_s is not None and self.retries > 0
            self.refused_retry_after_s = retry_after_s

    def retry(self) -> None:
        """Note that the client asks again after a refusal. Times go on counting from its first asking."""
        assert self.end_s is not None, f"{self.arrival.name} is asked for twice at once"
        assert not self.served, f"{self.arrival.name} was served"
        self.end_s = None
        self.retries += 1
        del self.token_times[:]

    @property
    def first_s(self) -> float | None:
        """Return when the first token came, None before it."""
        return self.token_times[0] if self.token_times else None

    @property
    def ttft_s(self) -> float:
        """Return seconds from arrival to the first token, of a request that was served."""
        return self.token_times[0] - self.arrival.call.arrival_s

    @property
    def tbt_s(self) -> float:
        """Mean seconds between tokens, of a request that was served; 0 for one of a single token."""
        assert self.end_s is not None
        return (self.end_s - self.token_times[0]) / max(1, self.arrival.call.output_tokens - 1)

    def in_time(self, slo: Slo) -> bool:
        """Return whether the request was served within both bounds."""
        return self.served and self.ttft_s <= slo.ttft_s and self.tbt_s <= slo.tbt_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """`goodput` is requests a second that were served within the SLO; percentiles are over those served."""

    requests: int
    served: int
    refused: int
    ttft_p50_s: float
    ttft_p95_s: float
    tbt_p50_s: float
    tbt_p95_s: float
    goodput: float

    def meets(self, slo: Slo) -> bool:
        """Return whether every request was served, and P95 of both times are within the bounds."""
        return self.served == self.requests and self.ttft_p95_s <= slo.ttft_s and self.tbt_p95_s <= slo.tbt_s


def summary(records: Iterable[Record], slo: Slo, seconds: float) -> Outcome:
    """Work out the figures of the requests that came in `seconds`."""
    records = list(records)
    served = [record for record in records if record.served]
    ttft = np.array([record.ttft_s for record in served] or [0.0])
    tbt = np.array([record.tbt_s for record in served] or [0.0])
    within = np.count_nonzero((ttft <= slo.ttft_s) & (tbt <= slo.tbt_s)) if served else 0
    return Outcome(
        requests=len(records),
        served=len(served),
        refused=sum(record.end_s is not None and not record.served for record in records),
        ttft_p50_s=float(np.percentile(ttft, 50)),
        ttft_p95_s=float(np.percentile(ttft, 95)),
        tbt_p50_s=float(np.percentile(tbt, 50)),
        tbt_p95_s=float(np.percentile(tbt, 95)),
        goodput=float(within / seconds),
    )
