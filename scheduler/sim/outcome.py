"""What a simulated run came to: its history, a record for each request, and the figures that papers print."""

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
    """One request's fate: seconds of its first token and of its end, and whether it was served."""

    arrival: Arrival
    first_s: float | None = None
    end_s: float | None = None
    served: bool = False
    retry_after_s: float | None = None

    def token(self, now: float) -> None:
        """Note a token."""
        self.first_s = now if self.first_s is None else self.first_s

    def end(self, now: float, served: bool, retry_after_s: float | None) -> None:
        """Note how it ended."""
        self.end_s, self.served, self.retry_after_s = now, served, retry_after_s

    @property
    def ttft_s(self) -> float:
        """Return seconds from arrival to the first token, of a request that was served."""
        assert self.first_s is not None
        return self.first_s - self.arrival.call.arrival_s

    @property
    def tbt_s(self) -> float:
        """Mean seconds between tokens, of a request that was served; 0 for one of a single token."""
        assert self.first_s is not None
        assert self.end_s is not None
        return (self.end_s - self.first_s) / max(1, self.arrival.call.output_tokens - 1)


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
