"""Ask peers again, in the background, what the names mean that they told. No request waits for it.

Once per period every remote name is asked for among the peers that are nearer to an owner. What it means there it
means here from then on; a name that nobody there knows is forgotten. While one of them does not answer it keeps its
meaning, so that what was pulled outlives its source. Requests keep the content that they were accepted with.
"""

import logging
import threading

from lora.adapter import RemoteName
from lora.errors import AdapterRefused, AdapterUnreachable, UnknownAdapter
from lora.store.names.remote_names import RemoteNames
from lora.store.tier_chain import TierChain
from transport.errors import TransportError

_CLOSE_S = 5.0  # for the question under way when it closes
_PAUSE_S = 0.02  # between two names, so that a thousand of them cost peers little; they take longer then
_log = logging.getLogger(__name__)


class NameRefresher:
    """Refreshes remote names, in a thread of its own if `every_s` is given. Needs no lock: it owns nothing."""

    def __init__(self, names: RemoteNames, tiers: TierChain, most_bytes: int, every_s: float | None) -> None:
        self._names = names
        self._tiers = tiers
        self._most_bytes = most_bytes
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if every_s is not None:
            self._thread = threading.Thread(
                target=self._run, args=(every_s,), name="adapter-names", daemon=True
            )
            self._thread.start()

    def refresh(self) -> None:
        """Ask once for each remote name, and wait for the answers."""
        for remote in self._names.names():
            if self._closed.is_set():
                return
            self._refresh(remote)
            if self._thread is not None:
                self._closed.wait(_PAUSE_S)

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _run(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            self.refresh()

    def _refresh(self, remote: RemoteName) -> None:
        try:
            told = self._tiers.confirm(remote, self._most_bytes)
        except (AdapterUnreachable, TransportError) as error:
            _log.debug("%s keeps its meaning: %s", remote.ref.name, error)
            return
        except (UnknownAdapter, AdapterRefused) as error:
            _log.debug("%s", error)
            told = None
        self._names.update(remote, told)
