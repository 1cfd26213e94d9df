"""Clients that ask a server again and again until told to stop."""

import threading
import urllib.error
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus

_REFUSALS = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class SteadyClients:
    """What was answered, how often they were told to come again, and what else came: a request that was lost."""

    def __init__(self, ask: Callable[[], str], count: int, pause_s: float = 0.0) -> None:
        """Begin: `count` clients, each of which waits `pause_s` after an answer."""
        self.texts: Counter[str] = Counter()
        self.refused = 0
        self.errors: list[Exception] = []
        self._ask, self._pause_s, self._stop = ask, pause_s, threading.Event()
        self._threads = [threading.Thread(target=self._go_on) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _go_on(self) -> None:
        while not self._stop.is_set():
            try:
                self.texts[self._ask()] += 1
                self._stop.wait(self._pause_s)
            except urllib.error.HTTPError as error:
                if error.code not in _REFUSALS:
                    self.errors.append(error)
                self.refused += 1
                self._stop.wait(0.3)
            except Exception as error:  # noqa: BLE001 - whatever it is, a request was lost
                self.errors.append(error)

    def end(self) -> None:
        """Stop, and wait for what was asked."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
