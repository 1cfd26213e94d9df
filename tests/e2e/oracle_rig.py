"""Requests of several adapters, and what an oracle answers to each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

Oracle = TypeVar("Oracle")


@dataclass(frozen=True)
class Job:
    """One request: its adapter, None for the base, and its prompt."""

    adapter: str | None
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class OracleRig(Generic[Oracle]):
    """A checkpoint, its adapters, requests over them, and the oracle's tokens for each."""

    folder: Path
    loras: dict[str, Path]
    jobs: tuple[Job, ...]
    expected: tuple[tuple[int, ...], ...]
    oracle: Oracle
