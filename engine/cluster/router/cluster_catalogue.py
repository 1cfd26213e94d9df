"""Show a router's administrators the cluster's registry of adapters: what the coordinator knows, and what is seen here.

While no coordinator answers, the router tells what it remembers; nothing can be changed then.
"""

from dataclasses import replace

from engine.catalogue.alias_targets import Targets
from engine.catalogue.base import AdapterRecord, ClusterRecord, EntrySettings, NodeRecord, names_after
from engine.cluster.control.ask_messages import RETRY_AFTER_S, Answer, Ask
from engine.cluster.control.cluster_status import adapters_of_view, cluster_of_view
from engine.cluster.router.forwarding import Forwarding
from engine.cluster.view import AdapterAdministration, ClusterView
from engine.errors import NotInTime, UnknownModel
from engine.live.live_outputs import LiveOutputs


class ClusterCatalogue:
    """AdapterCatalogue of a router. Used on one event loop."""

    def __init__(
        self,
        view: ClusterView,
        administration: AdapterAdministration,
        forwarding: Forwarding,
        outputs: LiveOutputs,
    ) -> None:
        self._view, self._administration = view, administration
        self._forwarding, self._outputs, self._uses = forwarding, outputs, outputs.uses

    async def records(self, after: str, limit: int) -> list[AdapterRecord]:
        """Describe the first `limit` names after `after`."""
        try:
            found = await self._administration.adapters(after, limit)
        except NotInTime:
            found = adapters_of_view(self._view, names_after(self._view.catalogue, after, limit))
        return [self._seen_here(each) for each in found]

    async def record(self, name: str) -> AdapterRecord:
        """Describe one name. Raises UnknownModel."""
        try:
            found = await self._administration.adapter(name)
        except NotInTime:
            known = adapters_of_view(self._view, [name] if name in self._view.catalogue else [])
            found = known[0] if known else None
        if found is None:
            raise UnknownModel(name)
        return self._seen_here(found)

    async def set_alias(self, name: str, target: str, targets: Targets = ()) -> None:
        """Let `name` mean what `target` means now. As AdapterCatalogue.set_alias."""
        await self._administration.set_alias(name, target, targets)

    async def set(self, name: str, settings: EntrySettings) -> None:
        """Ask something else for a name. As AdapterCatalogue.set."""
        await self._administration.set(name, settings)

    async def hold(self, name: str, seconds: float) -> None:
        """Let a name take no requests at any router for so long. Raises UnknownModel or NotInTime."""
        await self._administration.hold(name, seconds)

    async def release(self, name: str) -> None:
        """Let a name take requests again at every router. Raises UnknownModel or NotInTime."""
        await self._administration.hold(name, 0.0)

    async def abort(self, name: str) -> int:
        """End the requests that any router has under a name. As AdapterCatalogue.abort; raises NotInTime too."""
        return await self._administration.abort(name)

    async def answer(self, ask: Ask) -> Answer:
        """Do here what the coordinator has every router do."""
        match ask.act:
            case "hold":
                self._uses.held.hold(ask.name, ask.seconds)
                return Answer(ask.number)
            case "abort":
                return Answer(ask.number, aborted=self._outputs.abort(ask.name))
            case _:
                reason = f"a router cannot {ask.act} an adapter"
                return Answer.failed(ask.number, NotInTime(reason, RETRY_AFTER_S))

    async def cluster(self) -> ClusterRecord:
        """Describe the cluster."""
        try:
            found = await self._administration.cluster()
        except NotInTime:
            found = cluster_of_view(self._view)
        return replace(found, nodes=[self._linked(each) for each in found.nodes])

    def _seen_here(self, record: AdapterRecord) -> AdapterRecord:
        uses, name = self._uses, record.name
        held_s = uses.held.left_s(name)
        return replace(
            record, in_flight=uses.in_flight(name), last_use_s=uses.last_use_s(name), held_s=held_s
        )

    def _linked(self, node: NodeRecord) -> NodeRecord:
        """Add what this router hears from a node, or that it cannot reach it."""
        load = self._forwarding.router.heard(node.name)
        if node.name not in self._forwarding.ready or load is None:
            return replace(node, state="unreachable") if node.state == "serving" else node
        state = "draining" if load.draining else node.state
        return replace(node, state=state, requests=load.requests, seats=load.seats)
