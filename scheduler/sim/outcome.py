"""What a simulated run came to: its history, a record for each request, and the figures that papers print."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil

import numpy as np
from numpy.typing import NDArray

from scheduler.cluster.cost.profile import Slo
from scheduler.sim.workload.trace import Arrival

Floats = NDArray[np.float64]

_ENOUGH = 20  # requests of a tenant, to tell its part in time


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
    again then counts in `retries`, and in `promises_broken` if it is refused once more.
    """

    arrival: Arrival
    token_times: "array[float]" = field(default_factory=lambda: array("d"))
    end_s: float | None = None
    served: bool = False
    refused_retry_after_s: float | None = None
    retries: int = 0
    promises_broken: int = 0

    def token(self, now: float) -> None:
        """Note that a token reached the client."""
        self.token_times.append(now)

    def end(self, now: float, served: bool, retry_after_s: float | None = None) -> None:
        """Note that the request ended, and after how many seconds a client that was refused may ask again."""
        self.end_s, self.served = now, served
        if not served:
            self.promises_broken += self.refused_retry_after_s is not None and self.retries > 0
            self.refused_retry_after_s = retry_after_s

    def retry(self) -> None:
        """Note that the client asks again after a refusal. Times go on counting from its first asking."""
        assert self.end_s is not None, f"{self.arrival.name} is asked for twice at once"
        assert not self.served, f"{self.arrival.name} was served"
        self.end_s = None
        self.retries += 1
        del self.token_times[:]

    @property
    def promise_kept(self) -> bool:
        """Return whether the client was served when it came again as it was told to."""
        return self.served and self.refused_retry_after_s is not None

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
    """The figures of a run. Percentiles are over the requests that were served, `gap_p99_s` over all single gaps
    between tokens.

    `in_time` is the part of all requests that was served within the SLO, `goodput` such requests a second.
    `worst_tenant` is the least part in time of any tenant of 20 requests or more, None where there is none.
    `jain` is Jain's index of fairness of the tenants' parts in time, 1 where all are alike. Of clients that came
    again after a refusal when they were told to, `promises_kept` were then served and `promises_broken` refused.
    """

    requests: int
    served: int
    refused: int
    ttft_p50_s: float
    ttft_p95_s: float
    tbt_p50_s: float
    tbt_p95_s: float
    goodput: float
    in_time: float = 0.0
    gap_p99_s: float = 0.0
    worst_tenant: float | None = None
    jain: float | None = None
    promises_kept: int = 0
    promises_broken: int = 0

    def meets(self, slo: Slo) -> bool:
        """Return whether every request was served, and P95 of both times are within the bounds."""
        return self.served == self.requests and self.ttft_p95_s <= slo.ttft_s and self.tbt_p95_s <= slo.tbt_s


def summary(records: Iterable[Record], slo: Slo, seconds: float) -> Outcome:
    """Work out the figures of the requests that came in `seconds`."""
    records = list(records)
    served = [record for record in records if record.served]
    ttft = np.array([record.ttft_s for record in served] or [0.0])
    tbt = np.array([record.tbt_s for record in served] or [0.0])
    within = sum(record.in_time(slo) for record in served)
    tenants = list(in_time_by_tenant(records, slo).values())
    return Outcome(
        requests=len(records),
        served=len(served),
        refused=sum(record.end_s is not None and not record.served for record in records),
        ttft_p50_s=float(np.percentile(ttft, 50)),
        ttft_p95_s=float(np.percentile(ttft, 95)),
        tbt_p50_s=float(np.percentile(tbt, 50)),
        tbt_p95_s=float(np.percentile(tbt, 95)),
        gap_p99_s=_percentile(_gaps(records), 99),
        goodput=within / seconds,
        in_time=within / max(1, len(records)),
        worst_tenant=min(tenants, default=None),
        jain=_jain(tenants),
        promises_kept=sum(record.promise_kept for record in records),
        promises_broken=sum(record.promises_broken for record in records),
    )


def in_time_by_tenant(records: Iterable[Record], slo: Slo) -> dict[str, float]:
    """Work out the part in time of the requests of each tenant that has enough of them to tell."""
    found: dict[str, list[bool]] = {}
    for record in records:
        found.setdefault(record.arrival.tenant, []).append(record.in_time(slo))
    return {tenant: sum(each) / len(each) for tenant, each in found.items() if len(each) >= _ENOUGH}


def in_time_by_second(records: Iterable[Record], slo: Slo, seconds: float) -> tuple[float | None, ...]:
    """Work out the part in time of the requests that came in each second of the run, None where none did."""
    asked, within = ([0] * ceil(seconds) for _ in range(2))
    for record in records:
        second = min(int(record.arrival.call.arrival_s), len(asked) - 1)
        asked[second] += 1
        within[second] += record.in_time(slo)
    return tuple(part / count if count else None for part, count in zip(within, asked, strict=True))


def _gaps(records: Sequence[Record]) -> Floats:
    """List all gaps between two tokens of one request."""
    gaps = [np.diff(np.frombuffer(record.token_times)) for record in records if len(record.token_times) > 1]
    return np.concatenate(gaps) if gaps else np.zeros(0)


def _percentile(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0


def _jain(parts: Sequence[float]) -> float | None:
    """Work out Jain's index, (Σ x)² / (n · Σ x²) (arXiv cs/9809099); 1 where every part is 0."""
    if not parts:
        return None
    squares = len(parts) * sum(part * part for part in parts)
    return sum(parts) ** 2 / squares if squares else 1.0
