"""Keep what happened: each request, each fault, and a summary of both."""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scripts.results import Row

Outcome = Literal["right", "wrong", "lost", "refused"]
"""What became of a request. A refused one was answered 429; a lost one had no answer, wherever it was asked again."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request: when it was asked and had ended, how often it was sent, and what came of it."""

    asked_s: float
    ended_s: float
    adapter: str
    tokens: int
    attempts: int
    first_token_s: float | None  # of the attempt that answered
    outcome: Outcome
    why: str = ""

    def row(self) -> Row:
        """Return it as a row of results."""
        first = None if self.first_token_s is None else round(self.first_token_s, 3)
        row: dict[str, object] = {
            "asked_s": round(self.asked_s, 2), "ended_s": round(self.ended_s, 2), "adapter": self.adapter,
            "tokens": self.tokens, "attempts": self.attempts, "first_token_s": first, "outcome": self.outcome,
        }  # fmt: skip
        return row | {"why": self.why} if self.why else row


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """One fault: what was done to whom, and from when to when."""

    kind: str
    who: str
    began_s: float
    ended_s: float

    @property
    def title(self) -> str:
        """Name the fault by the role that it befell."""
        roles = [name.rpartition("-")[0] or name for name in self.who.split("+")]
        return f"{' and '.join(roles)} {self.kind}"

    def row(self) -> Row:
        """Return it as a row of results."""
        return {
            "fault": self.kind, "who": self.who, "began_s": round(self.began_s, 2),
            "ended_s": round(self.ended_s, 2),
        }  # fmt: skip


@dataclass(slots=True)
class Records:
    """All of a run; `moved` are streams and requests that routers sent anew because a node was lost or gave them back.

    `streams_failed` began and were ended by an error that the router told; `streams_broken` were cut off though nothing
    had befallen their router. Neither may happen. Of `streams_silent` nothing came for a while, and clients went on to
    another router; on a machine that is fast enough there are none.
    """

    requests: list[RequestRecord] = field(default_factory=list[RequestRecord])
    faults: list[FaultRecord] = field(default_factory=list[FaultRecord])
    moved: int = 0
    streams_failed: int = 0
    streams_broken: int = 0
    streams_silent: int = 0

    def summary(self) -> dict[str, object]:
        """Sum up."""
        outcomes = Counter(record.outcome for record in self.requests)
        first = sorted(each.first_token_s for each in self.requests if each.first_token_s is not None) or [
            0.0
        ]
        return {
            "requests": len(self.requests),
            **{outcome: outcomes[outcome] for outcome in ("right", "wrong", "lost", "refused")},
            "asked_again": sum(record.attempts > 1 for record in self.requests),
            "moved": self.moved,
            "streams_failed": self.streams_failed,
            "streams_broken": self.streams_broken,
            "streams_silent": self.streams_silent,
            "tokens": sum(each.tokens for each in self.requests if each.outcome == "right"),
            "ttft_p50_s": round(first[len(first) // 2], 3),
            "ttft_p95_s": round(first[int(len(first) * 0.95)], 3),
            "ttft_p99_s": round(first[int(len(first) * 0.99)], 3),
            "faults": len(self.faults),
            "by_fault": dict(sorted(Counter(fault.title for fault in self.faults).items())),
            "failures": dict(Counter(each.why for each in self.requests if each.why).most_common(10)),
        }

    @property
    def is_sound(self) -> bool:
        """Tell whether clients saw nothing but answers, and those right."""
        bad = {"wrong", "lost"}
        return bool(self.requests) and not (
            self.streams_failed or self.streams_broken or any(each.outcome in bad for each in self.requests)
        )

    def write(self, path: Path, asked: Row) -> None:
        """Write rows, compressed: what was asked of the run with its summary, then faults, then requests in order."""
        requests: Sequence[RequestRecord] = sorted(self.requests, key=lambda each: each.asked_s)
        rows = [{"asked": asked, **self.summary()}, *(each.row() for each in (*self.faults, *requests))]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a name and a time in it, the same rows are the same bytes.
        with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, 0) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
