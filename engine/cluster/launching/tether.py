"""Become another program that ends when the thread that started it does: python tether.py PARENT NICENESS COMMAND...

Linux sends the signal (prctl, PR_SET_PDEATHSIG), whatever the starter dies of; it outlives the change of program. It
is asked for in a process of its own: in a fork of a process with threads little is safe.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1


def main(arguments: Sequence[str]) -> None:
    """Become the command, tied to the process that `arguments` begin with, and so nice. Does not return."""
    parent, niceness, *command = arguments
    os.nice(int(niceness))
    with suppress(OSError):  # where Linux groups processes by session, the group's niceness is what counts
        Path("/proc/self/autogroup").write_text(niceness)
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the signal was asked for
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
