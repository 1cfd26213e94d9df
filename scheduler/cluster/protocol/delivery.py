"""Commands that arrive once and in order over a network that loses, doubles and reorders them.

Both ends are plain counters: the coordinator's resends what is not yet applied, the node's obeys the next
number only. It follows that a report which says `applied = k` tells the truth about commands 1 to k and about
no later one.
"""

from dataclasses import replace

from scheduler.cluster.protocol.messages import AllowLeave, Drop, Numbered, Pull


class Outbox:
    """The coordinator's end, for one session of one node."""

    def __init__(self) -> None:
        self._last = 0
        self._sent_s: dict[int, float] = {}
        self._waiting: dict[int, Numbered] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def send(self, command: Numbered, now: float) -> Numbered:
        """Number `command` and remember it until it is applied."""
        self._last += 1
        numbered = replace(command, number=self._last)
        self._waiting[self._last] = numbered
        self._sent_s[self._last] = now
        return numbered

    def applied(self, number: int) -> None:
        """Forget the commands up to `number`."""
        for done in [waiting for waiting in self._waiting if waiting <= number]:
            del self._waiting[done], self._sent_s[done]

    def overdue(self, now: float, retry_s: float) -> list[Numbered]:
        """Return the commands to send again, in order, sent longest ago than `retry_s`."""
        late = [number for number, sent_s in self._sent_s.items() if now - sent_s >= retry_s]
        self._sent_s.update((number, now) for number in late)
        return [self._waiting[number] for number in late]


class Inbox:
    """The node's end, for one session. `applied` is what its reports say."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.applied = 0
        self._early: dict[int, Numbered] = {}

    def receive(self, command: Numbered) -> list[Numbered]:
        """Return the commands that are to be obeyed now, in order: none for a repeat, a gap or another
        session."""
        if command.session != self.session or command.number <= self.applied:
            return []
        self._early[command.number] = command
        due: list[Pull | Drop | AllowLeave] = []
        while self.applied + 1 in self._early:
            self.applied += 1
            due.append(self._early.pop(self.applied))
        return due
