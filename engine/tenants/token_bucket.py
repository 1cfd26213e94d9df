"""Bound a rate by a token bucket. It may not know what is counted, nor which clock tells the time."""


class TokenBucket:
    """A token bucket (Turner, "New directions in communications", IEEE Communications Magazine, 1986).

    With capacity b and rate r = b / period the level at time t + d is min(b, level(t) + r * d). It begins full. What
    is given back was reserved and not used. More may be taken than there is: that debt is waited for.
    """

    _DUST = 1e-6  # of one unit: what rounding may cost

    def __init__(self, capacity: float, period_s: float, now_s: float) -> None:
        """Begin full, with `capacity` units that flow in within `period_s`."""
        self.capacity = capacity
        self._period_s = period_s
        self._level, self._at_s = capacity, now_s

    def level(self, now_s: float) -> float:
        """Return how many units there are; below 0 it is a debt."""
        flowed = self.capacity * max(0.0, now_s - self._at_s) / self._period_s
        return min(self.capacity, self._level + flowed)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return in how many seconds there are `amount` units, if nobody takes any; infinity if there never are."""
        if amount > self.capacity:
            return float("inf")
        lacking = amount - self.level(now_s)
        return lacking * self._period_s / self.capacity if lacking > self._DUST else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Take units, whether they are there or not."""
        self._set(self.level(now_s) - amount, now_s)

    def give_back(self, amount: float, now_s: float) -> None:
        """Put back units that were taken and not used; there are never more than the capacity."""
        self._set(min(self.capacity, self.level(now_s) + amount), now_s)

    def resize(self, capacity: float, now_s: float) -> None:
        """Hold another capacity from now on; what was taken stays taken."""
        taken = self.capacity - self.level(now_s)
        self.capacity = capacity
        self._set(capacity - taken, now_s)

    def _set(self, level: float, now_s: float) -> None:
        self._level, self._at_s = level, max(now_s, self._at_s)
