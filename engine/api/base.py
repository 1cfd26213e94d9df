"""Define what the API needs of an engine, and of a format of responses, and no more.

`engine.async_engine` implements EngineClient, and so does a fake in the tests.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from engine.api.parsing import FetchedModels
from engine.catalogue.base import AdapterCatalogue, ClusterRecords
from engine.metrics.series import MetricSeries
from engine.metrics.snapshot import Snapshot, Standing
from engine.metrics.telemetry import Telemetry
from engine.output import Delta
from engine.runner.step_history import StepRecord
from engine.tenants.accounts import TenantAccounts
from engine.tenants.usage_counts import UsageCounts
from lora.adapter import AdapterEntry, AdapterRef
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from lora.sources.source_url import AdapterSource
from scheduler.request import NOWHERE, Origin, SamplingParams


class OutputStream(Protocol):
    """One request's output as it comes: the Deltas of all its sequences, interleaved.

    Each sequence ends with a finish_reason. Iterating raises EngineError if the engine gives the request up.
    """

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache supplied; known with the first Delta."""
        ...

    @property
    def adapter_digest(self) -> str:
        """The digest of the adapter's content that answers; empty for the base model."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def aclose(self) -> None:
        """Abort what still runs and free it; whoever iterates gets what has come, and then the end."""
        ...


class ObservedServer(Protocol):
    """A server as those see it who look after it, whether or not it answers requests."""

    @property
    def telemetry(self) -> Telemetry:
        """What it counts and times."""
        ...

    @property
    def model_name(self) -> str:
        """The name of the base model; empty where no requests are answered."""
        ...

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names by which requests may call the base model, `model_name` first."""
        ...

    @property
    def catalogue(self) -> ClusterRecords:
        """The cluster and its adapters."""
        ...

    def series(self) -> Sequence[MetricSeries]:
        """Tell more of this moment as metrics; of single adapters, only of those that were used last."""
        ...

    def stats(self) -> Snapshot | Standing:
        """Describe it at this moment."""
        ...


class EngineClient(FetchedModels, ObservedServer, Protocol):
    """An engine as the API sees it."""

    @property
    def accounts(self) -> TenantAccounts:
        """What tenants may use, and how much they have used of it."""
        ...

    @property
    def usage(self) -> UsageCounts:
        """What tenants have used by day and adapter, and nobody keeps yet."""
        ...

    @property
    def model_root(self) -> str:
        """Where the base model came from."""
        ...

    @property
    def created_s(self) -> int:
        """When the engine was made, in seconds since 1970."""
        ...

    async def start(self) -> None:
        """Begin to work."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait, at most `timeout_s`, for what runs to end."""
        ...

    async def close(self) -> None:
        """Stop; what still runs ends with an error."""
        ...

    async def submit_all(
        self,
        model: str,
        prompts: Mapping[str, tuple[int, ...]],
        params: SamplingParams,
        origin: Origin = NOWHERE,
    ) -> Sequence[OutputStream]:
        """Queue a request for each of `prompts`, whose keys are request ids: all of them or none.

        Where tenants take turns it is by the origin's; of what waits, the lower priority goes first.

        Raises UnknownModel, InvalidAdapter, InvalidParameter, RequestRefused, TooManySequences, BeyondLimit,
        RateLimited, Overloaded or Draining.
        """
        ...

    async def load_adapter(
        self, name: str, folder: AdapterSource, replaces: bool = True, roots: AllowedRoots = ANYWHERE
    ) -> AdapterRef:
        """Read, check and register an adapter; without `replaces` only under a name that means nothing yet.

        A folder's files are read only from below `roots`, now and later; a URL's are fetched first.

        Raises InvalidAdapterName, AdapterExists, InvalidAdapter or AdapterFailed.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises UnknownModel."""
        ...

    @property
    def catalogue(self) -> AdapterCatalogue:
        """The registry of adapters, as administrators see it."""
        ...

    def adapters(self) -> tuple[AdapterEntry, ...]:
        """List the adapters that requests may name."""
        ...

    def recent_steps(self) -> Sequence[StepRecord] | None:
        """Describe the last steps, the newest first; None of what computes none."""
        ...

    def stats(self) -> Snapshot:
        """Describe the engine at this moment."""
        ...


class ChoiceWriter(Protocol):
    """Writes what was generated as the entries of `choices` in one endpoint's responses."""

    @property
    def chunk_object(self) -> str | None:
        """The `object` of a stream's chunks; None if they have none."""
        ...

    @property
    def whole_object(self) -> str | None:
        """The `object` of a response that comes whole; None if it has none."""
        ...

    def opening(self) -> tuple[dict[str, object], ...]:
        """Write the entries that a stream begins with, before anything is generated."""
        ...

    def beside(self, first: Delta) -> dict[str, object]:
        """Write what stands beside `choices`; `first` begins choice 0. Streams leave out what is null."""
        ...

    def part(self, choice: int, delta: Delta) -> dict[str, object] | None:
        """Write the entry of one Delta; None if there is nothing to show yet."""
        ...

    def whole(self, choice: int, delta: Delta) -> dict[str, object]:
        """Write the entry of a choice whose Deltas are joined in `delta`."""
        ...
