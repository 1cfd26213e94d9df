"""Hold an interruption back while the engine's books are being changed.

Offline use steps the engine in the caller's own thread, which is where Python raises KeyboardInterrupt: at any line.
"""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible_between_steps() -> Generator[Callable[[], None]]:
    """Hold back the first KeyboardInterrupt until `check` is called: within a step it would tear the engine's books.

    The second one comes through at once. Other threads than the main one never get any.
    """
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            raise KeyboardInterrupt

    def check() -> None:
        if arrived:
            raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()
