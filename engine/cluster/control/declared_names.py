"""Find out what the names mean that nodes have from their own options and folders.

A node says which names it declares. For each name that the catalogue lacks, one node that declares it is asked to read,
check and try it. That node owns the name then: only what it declares later changes the name's meaning.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping

from engine.catalogue.catalogue_file import RegisteredName
from engine.cluster.control.ask_messages import Answer
from engine.cluster.control.control_messages import Declares
from engine.cluster.control.member_stream import MemberStream
from engine.cluster.control.shared_catalogue import SharedCatalogue
from engine.errors import EngineError, NotInTime, UnknownModel

MOST_NAMES = 1 << 17
"""Of one node."""
_AT_ONCE = 4  # of one node: each reads files and computes a trial
_RESOLVE_S = 300.0  # what reads files and tries adapters has deadlines of its own, which are sooner
_AGAIN_S = 5.0  # until what may pass is asked for again
_log = logging.getLogger(__name__)


class _Declarer:
    """What one node's stream declares, and what of it is to be asked for."""

    def __init__(self, stream: MemberStream) -> None:
        self.stream = stream
        self.names: dict[str, str] = {}  # with digests, "" where the folder was not read
        self.is_complete = False  # the first message of a stream names all
        self.due: deque[str] = deque()
        self.running = 0


class DeclaredNames:
    """What each connected node declares. Used on one event loop."""

    def __init__(self, catalogue: SharedCatalogue) -> None:
        self._catalogue = catalogue
        self._declarers: dict[str, _Declarer] = {}
        self._asking: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        """Tell whether names are still to be asked for."""
        return bool(self._tasks) or any(each.due for each in self._declarers.values())

    def join(self, stream: MemberStream) -> None:
        """Take in a node that declares nothing yet."""
        self._declarers[stream.hello.name] = _Declarer(stream)

    def leave(self, stream: MemberStream) -> None:
        """Let a stream's declarations be of no account; its names keep their meaning, for others hold copies."""
        declarer = self._declarers.get(stream.hello.name)
        if declarer is not None and declarer.stream is stream:
            del self._declarers[stream.hello.name]

    def hold(self, name: str) -> bool:
        """Ask no node for a name until `release`; False if it is asked for or held already."""
        if name in self._asking:
            return False
        self._asking.add(name)
        return True

    def release(self, name: str) -> None:
        """Undo a `hold`."""
        self._asking.discard(name)

    def who_declares(self, name: str) -> list[MemberStream]:
        """Return the connected nodes that declare a name."""
        return [each.stream for each in self._declarers.values() if name in each.names]

    def forget(self, name: str) -> None:
        """Let no connected node count as one that declares a name, which was removed or given another meaning."""
        for declarer in self._declarers.values():
            declarer.names.pop(name, None)

    def declare(self, stream: MemberStream, told: Declares) -> None:
        """Take in what a node declares; asks for what is not known."""
        declarer = self._declarers[stream.hello.name]
        for name in told.gone:
            declarer.names.pop(name, None)
            self._lose(name, declarer)
        declarer.names.update(told.names)
        if len(declarer.names) > MOST_NAMES:
            stream.end(f"it declares more than {MOST_NAMES} names")
            return
        if not declarer.is_complete:
            declarer.is_complete = True
            for name, registered in list(self._catalogue.names.items()):
                if registered.owner == stream.hello.name and name not in declarer.names:
                    self._lose(name, declarer)
        declarer.due.extend(name for name in told.names if self._is_wanted(name, declarer))
        self._advance(declarer)

    async def close(self) -> None:
        """Ask for nothing more."""
        self._declarers.clear()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _is_wanted(self, name: str, declarer: _Declarer) -> bool:
        """Tell whether the node is to be asked what the name means, as far as is known now."""
        digest = declarer.names.get(name)
        known = self._catalogue.names.get(name)
        if digest is None or name in self._asking:
            return False
        if known is None:
            return True
        # A folder that was not read since the node started may have changed.
        return known.owner == declarer.stream.hello.name and digest != known.entry.ref.digest

    def _advance(self, declarer: _Declarer) -> None:
        """Ask a node for what is due, a few names at a time."""
        while declarer.due and declarer.running < _AT_ONCE and not declarer.stream.ended.done():
            name = declarer.due.popleft()
            if self._is_wanted(name, declarer):
                declarer.running += 1
                self._asking.add(name)
                self._start(name, declarer)

    def _start(self, name: str, declarer: _Declarer) -> None:
        task = asyncio.create_task(self._resolve(name, declarer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _resolve(self, name: str, declarer: _Declarer) -> None:
        try:
            answer = await declarer.stream.ask("resolve", name, _RESOLVE_S)
            answer.check(name)
            await self._bind(name, declarer, answer)
        except NotInTime:
            asyncio.get_running_loop().call_later(_AGAIN_S, self._ask_again, name, declarer)
        except EngineError as error:
            node = declarer.stream.hello.name
            _log.warning("adapter %s of node %s is not in the catalogue: %s", name, node, error)
            self._asking.discard(name)
            self._ask_others(name, declarer)
        finally:
            self._asking.discard(name)
            declarer.running -= 1
            self._advance(declarer)

    async def _bind(self, name: str, declarer: _Declarer, answer: Answer) -> None:
        """Let a name mean what its node found, unless it came to mean something else meanwhile."""
        if answer.entry is None or answer.entry.name != name:
            raise UnknownModel(name)
        node, entry = declarer.stream.hello.name, answer.entry.entry()
        bound = await self._catalogue.put(
            RegisteredName(entry, node), lambda known: known is None or known.owner == node
        )
        if bound and name in declarer.names:
            declarer.names[name] = entry.ref.digest

    def _ask_again(self, name: str, declarer: _Declarer) -> None:
        if self._declarers.get(declarer.stream.hello.name) is declarer:
            declarer.due.append(name)
            self._advance(declarer)

    def _ask_others(self, name: str, refused: _Declarer) -> None:
        """Ask another node that declares a name, once; the one that refused it declares it no more."""
        refused.names.pop(name, None)
        for other in self._declarers.values():
            if self._is_wanted(name, other):
                other.due.append(name)
                self._advance(other)
                return

    def _lose(self, name: str, declarer: _Declarer) -> None:
        """Let a name that its owner declares no more mean what another node declares, or nothing."""
        known = self._catalogue.names.get(name)
        if known is not None and known.owner == declarer.stream.hello.name:
            task = asyncio.create_task(self._remove(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _remove(self, name: str) -> None:
        try:
            await self._catalogue.remove(name)
        except EngineError as error:
            _log.warning("adapter %s stays in the catalogue though its owner has lost it: %s", name, error)
            return
        for other in self._declarers.values():
            if self._is_wanted(name, other):
                other.due.append(name)
                self._advance(other)
                return


def declared_changes(before: Mapping[str, str], now: Mapping[str, str], is_first: bool) -> Declares | None:
    """Return what a node is to tell of its names, if anything; the first time on a stream it tells all."""
    names = {name: digest for name, digest in now.items() if before.get(name) != digest}
    gone = tuple(name for name in before if name not in now)
    return Declares(names, gone) if names or gone or is_first else None
