"""Plans on their way: the one that is being made, and those that are made and not committed."""

from collections import abc, deque

from scheduler.plan import Slice, StepPlan
from scheduler.sequence import Sequence


class PlanDraft:
    """The plan in the making: its slices and the rows still to give away.

    `waits_for_token` says that it draws a token without which the sequence cannot be planned further.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.waits_for_token = False
        self.sequences: list[Sequence] = []  # whose slices they are
        self._slices: list[Slice] = []

    def take(self, sequence: Sequence) -> None:
        """Add the sequence's next tokens, as far as rows are left."""
        part = sequence.take(self.rows)
        self._slices.append(part)
        self.sequences.append(sequence)
        self.rows -= len(part.token_ids)
        if sequence.reads_output and part.samples:
            self.waits_for_token = True

    def plan(self) -> StepPlan:
        """Return what has been added."""
        return StepPlan(tuple(self._slices))


class PlansInFlight:
    """The plans that are made and not committed, the oldest first, each with the sequences of its slices."""

    def __init__(self) -> None:
        self._plans: deque[tuple[StepPlan, list[Sequence]]] = deque()

    def add(self, plan: StepPlan, sequences: list[Sequence]) -> None:
        """Note a plan that was made; an empty one draws nothing and is not noted."""
        if plan.slices:
            self._plans.append((plan, sequences))

    def begin_commit(self, plan: StepPlan) -> abc.Sequence[Sequence]:
        """Return the sequences of the plan's slices. Forget the plans before it, whose steps failed."""
        if not plan.slices:
            return ()
        while self._plans[0][0] is not plan:
            self._plans.popleft()
        return self._plans[0][1]

    def retry(self, plan: StepPlan) -> StepPlan:
        """Take back the plan and all after it, and put in flight again what is awaited of the plan itself.

        All plans before it must be committed: the tokens that were pending in it are then known. What later plans
        hold is void, and will be planned anew, into the same blocks.
        """
        sequences = self.begin_commit(plan)
        awaited = [
            (sequence, part)
            for sequence, part in zip(sequences, plan.slices, strict=True)
            if sequence.in_flight and sequence.in_flight[0] is part
        ]
        for _, planned in self._plans:
            for sequence in planned:
                sequence.void_slices()
        again = StepPlan(tuple(sequence.take(len(part.token_ids)) for sequence, part in awaited))
        self._plans.clear()
        self.add(again, [sequence for sequence, _ in awaited])
        return again

    def awaited(self, plan: StepPlan) -> tuple[Slice, ...]:
        """Return the slices of the plan that their sequences still wait for; the rest are void."""
        sequences = next((planned for made, planned in self._plans if made is plan), list[Sequence]())
        return tuple(
            part
            for sequence, part in zip(sequences, plan.slices, strict=True)
            if any(part is each for each in sequence.in_flight)
        )
