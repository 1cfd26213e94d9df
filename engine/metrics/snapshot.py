"""Describe a server at one moment, for metrics and health."""

from dataclasses import dataclass
from typing import Protocol

from lora.store.stats import StoreStats
from scheduler.blocks import BlockStats


class Snapshot(Protocol):
    """What a scrape reads of an engine at one moment."""

    @property
    def running(self) -> int:
        """Return how many sequences run."""
        ...

    @property
    def waiting(self) -> int:
        """Return how many sequences wait to run."""
        ...

    @property
    def preemptions(self) -> int:
        """Return how often a sequence gave up its K/V for others."""
        ...

    @property
    def steps(self) -> int:
        """Return how many steps there were."""
        ...

    @property
    def trouble(self) -> str | None:
        """Say why requests cannot be served; None while they can."""
        ...

    @property
    def blocks(self) -> BlockStats:
        """Return how many K/V blocks are in which state."""
        ...

    @property
    def store(self) -> StoreStats:
        """Return the adapter store's counts."""
        ...


@dataclass(frozen=True, slots=True)
class Standing:
    """What is told of a server that computes nothing and sends no requests: why it does not work, if so."""

    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and health: sequences, steps, K/V blocks, resident adapters."""

    running: int
    waiting: int
    preemptions: int
    steps: int
    trouble: str | None  # why requests cannot be served
    blocks: BlockStats
    store: StoreStats
