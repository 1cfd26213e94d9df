"""Lending: the resident adapters that peers may pull, straight from the pages that the steps read.

A content is lent while it is resident, under its digest and under every name that means it. It is recalled before
its pages are reused, which must wait until the last peer has read them.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from lora.flat import FlatLayout
from lora.note import note_name, rows_name, write_note
from lora.pool import PageRun
from lora.shared_pages import Notebook, SharedPages
from transport.base import Region, Transport

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Loan:
    """One content's note: how many reasons there are to keep it, and how to let it go."""

    note: Region
    give_back: Callable[[], None]
    reasons: int = 1


class Lending:
    """What this node lends. Safe to use from any thread; nothing waits."""

    def __init__(self, base: str, transport: Transport, pages: SharedPages, notebook: Notebook) -> None:
        self._base = base
        self._transport = transport
        self._pages = pages
        self._notebook = notebook
        self._lock = threading.RLock()  # re-entered where a future is done already
        self._names: dict[str, str] = {}  # the digest that each name means, lent or not
        self._loans: dict[str, _Loan] = {}  # by digest

    def bind(self, name: str, digest: str) -> None:
        """`name` means this content from now on."""
        with self._lock:
            self.unbind(name)
            self._names[name] = digest
            if digest in self._loans:
                self._lend_note(name, self._loans[digest])

    def unbind(self, name: str) -> None:
        """`name` means nothing any more."""
        with self._lock:
            digest = self._names.pop(name, None)
            if digest in self._loans:
                self._withdraw_note(name, self._loans[digest])

    def lend(self, digest: str, layout: FlatLayout, run: PageRun) -> None:
        """The content lies in `run` and will not change: let peers have it."""
        written = write_note(digest, layout)
        place = self._notebook.take(len(written))
        if place is None:
            _log.warning("adapter %s is not lent: no memory is left for its note", digest[:12])
            return
        note, give_back = place
        note.view()[:] = written
        with self._lock:
            self._transport.publish(rows_name(digest), [self._pages.region(run, layout.nbytes)])
            loan = self._loans[digest] = _Loan(note, give_back)
            for name, meant in self._names.items():
                if meant == digest:
                    self._lend_note(name, loan)

    def recall(self, digest: str) -> Future[None]:
        """Lend the content no more; done when no peer reads its pages."""
        with self._lock:
            loan = self._loans.pop(digest, None)
            if loan is None:
                nobody: Future[None] = Future()
                nobody.set_result(None)
                return nobody
            for name, meant in self._names.items():
                if meant == digest:
                    self._withdraw_note(name, loan)
            self._drop_reason(loan)
            return self._transport.withdraw(rows_name(digest))

    def _lend_note(self, name: str, loan: _Loan) -> None:
        loan.reasons += 1
        self._transport.publish(note_name(self._base, name), [loan.note])

    def _withdraw_note(self, name: str, loan: _Loan) -> None:
        read = self._transport.withdraw(note_name(self._base, name))
        read.add_done_callback(lambda _: self._drop_reason(loan))

    def _drop_reason(self, loan: _Loan) -> None:
        with self._lock:
            loan.reasons -= 1
            if not loan.reasons:
                loan.give_back()
