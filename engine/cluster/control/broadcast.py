"""Tell all members what the cluster is: each change is encoded once, and every stream gets the same bytes in order."""

import asyncio
import time
from collections.abc import Mapping

from engine.cluster.control.control_messages import encoded
from engine.cluster.control.declared_names import DeclaredNames
from engine.cluster.control.member_stream import MemberStream
from engine.cluster.control.shared_catalogue import SharedCatalogue
from engine.cluster.control.view_codec import SharedView, ViewEncoder
from engine.cluster.view import Member
from scheduler.cluster.coordinator.coordinator import Coordinator

_GATHER_S = 0.05  # changes that come close together are told as one
_SETTLE_S, _MOST_SETTLE_S = 3.0, 20.0


class Broadcast:
    """What has been told to all streams. Used on one event loop."""

    def __init__(
        self,
        streams: Mapping[str, MemberStream],
        catalogue: SharedCatalogue,
        coordinator: Coordinator,
        declared: DeclaredNames,
    ) -> None:
        """Tell `streams` what the others know; nobody has been told anything yet."""
        self._streams, self._catalogue = streams, catalogue
        self._coordinator, self._declared = coordinator, declared
        self._encoder = ViewEncoder()
        self._whole: list[bytes] | None = None
        self._told: dict[str, MemberStream] = {}
        self._fresh: list[MemberStream] = []  # they are told all, with the next change
        self._told_all_s = float("-inf")  # when streams were last told all
        self._timer: asyncio.TimerHandle | None = None
        self._began_s = time.monotonic()
        self._settled = self._closed = False

    def begin(self, stream: MemberStream) -> None:
        """Tell a new stream all, and let it have every change from then on.

        Streams that begin close together are told together: many members may come at once.
        """
        self._fresh.append(stream)
        if time.monotonic() - self._told_all_s < _GATHER_S:
            self.plan()
        else:
            self._tell()

    def plan(self) -> None:
        """Have all told soon if anything has changed."""
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(_GATHER_S, self._tell)

    def close(self) -> None:
        """Tell nothing more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._closed:
            return
        frames = [encoded(part) for part in self._encoder.advance(self._view())]
        self._told = {name: each for name, each in self._told.items() if self._streams.get(name) is each}
        if frames:
            self._whole = None
            for stream in self._told.values():
                for frame in frames:
                    stream.send_frame(frame)
        self._tell_all()

    def _tell_all(self) -> None:
        """Tell what there is to the streams that know nothing yet."""
        fresh, self._fresh = self._fresh, []
        self._told_all_s = time.monotonic() if fresh else self._told_all_s
        for stream in fresh:
            if self._streams.get(stream.hello.name) is not stream:
                continue
            if self._whole is None:
                self._whole = [encoded(part) for part in self._encoder.whole()]
            for frame in self._whole:
                stream.send_frame(frame)
            self._told[stream.hello.name] = stream

    def _view(self) -> SharedView:
        """Return what is so now. What a successor has not heard of yet, members keep until it is settled."""
        since_s = time.monotonic() - self._began_s
        if (since_s >= _SETTLE_S and not self._declared.is_busy) or since_s >= _MOST_SETTLE_S:
            self._settled = True
        members = {name: _member(each) for name, each in self._streams.items() if each.is_node}
        table, count = self._coordinator.table, self._coordinator.plans.count
        told = self._coordinator.size.told
        wanted = told.wanted if told else 0
        routers = tuple(sorted(name for name, each in self._streams.items() if not each.is_node))
        return SharedView(members, self._catalogue.entries, table, self._settled, count, wanted, routers)


def _member(stream: MemberStream) -> Member:
    hello = stream.hello
    return Member(hello.name, hello.start, hello.address, hello.peer_address or None, hello.zone)
