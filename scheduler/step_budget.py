"""How many rows a step may have, so that the tokens of those that decode do not come too late.

A long prompt read in one step holds up all sequences that decode beside it. Read in pieces it takes a few steps
more, each of which draws a token for everyone.
"""

_KEPT = 0.98  # of what earlier steps told, in each step
_ENOUGH_STEPS = 8.0


class StepBudget:
    """Learns what a row of a prompt adds to a step, and keeps steps within `step_s` seconds.

    Seconds are taken to be linear in the prompts' rows: least squares of the recent steps, the older ones forgotten.
    A step has at least `least_rows` and at most `most_rows` of them.
    """

    def __init__(self, step_s: float, most_rows: int, least_rows: int = 128) -> None:
        if step_s <= 0 or not least_rows >= 1:
            raise ValueError(f"step_s={step_s}, least_rows={least_rows}: give more than 0 seconds and rows")
        self._step_s, self._most, self._least = step_s, most_rows, min(least_rows, most_rows)
        self._count = self._rows = self._rows2 = self._seconds = self._rows_seconds = 0.0
        self.rows = most_rows

    def ran(self, prompt_rows: int, seconds: float) -> None:
        """Take in that a step with so many rows of prompts took `seconds`."""
        self._count = self._count * _KEPT + 1
        self._rows = self._rows * _KEPT + prompt_rows
        self._rows2 = self._rows2 * _KEPT + prompt_rows * prompt_rows
        self._seconds = self._seconds * _KEPT + seconds
        self._rows_seconds = self._rows_seconds * _KEPT + prompt_rows * seconds
        if self._count >= _ENOUGH_STEPS:
            self._budget()

    def _budget(self) -> None:
        """Solve for the rows that `step_s` has room for; they stay as they are if steps were all alike."""
        spread = self._count * self._rows2 - self._rows * self._rows
        if spread < self._count * self._least:
            return
        row_s = (self._count * self._rows_seconds - self._rows * self._seconds) / spread
        if row_s <= 0:
            self.rows = self._most
            return
        empty_s = (self._seconds - row_s * self._rows) / self._count
        self.rows = max(self._least, min(self._most, int((self._step_s - empty_s) / row_s)))
