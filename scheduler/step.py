"""StepScheduler: which tokens run in the next step.

There are no phases: a sequence has tokens, some of them computed; each step lets the computed ones catch up,
within a budget of rows, of sequences and of K/V blocks. A sequence that catches up draws its next token. It
knows no tensor and no clock: `now` and the resident adapters are arguments, and its decision is a StepPlan.
"""

from collections import abc
from itertools import chain

from lora.adapter import AdapterRef
from scheduler.blocks import BlockPool, BlockStats
from scheduler.draft import PlanDraft, PlansInFlight
from scheduler.limits import MOST_ROWS, RequestRefused, StepLimits, check_request
from scheduler.plan import Live, Overdue, SequenceKey, Slice, SliceOutput, StepPlan, TokenEvent
from scheduler.request import Request
from scheduler.sequence import Sequence
from scheduler.tenant_turns import TenantTurns
from scheduler.waiting import WaitingSequences


class StepScheduler:
    """Continuous batching over paged K/V with a prefix cache and many adapters.

    **Order.** First come the running sequences that need one row (decode), then those that need more (chunks
    of a prompt). Those that wait follow, first come first served, or tenants by turns, until rows, sequences or
    blocks run out. One that does not fit stops admission: nothing overtakes for being small. Background goes last.

    **Memory.** A sequence is admitted with blocks for all its tokens, and grows by a block when decode crosses into
    it. When none is left a running sequence is preempted: the one admitted last, but rather one whose adapter is
    away. Its blocks stay in the prefix cache until they are needed; it keeps its tokens and waits at the front to be
    recomputed. Each preemption buys its asker a new output token, or else the asker itself gives way to earlier ones
    that all ran; output tokens are never lost; and `add` refuses what could not run alone. So every sequence ends.

    **Adapters.** A sequence whose adapter is not resident is passed over. The bound: `adapter_patience_s` after
    it was first passed over its adapter is `overdue`. The store then names those that are to leave for it, and
    their sequences are admitted no more; all others are. What runs goes on. So it waits at most for its
    patience, for those overdue before it, for running sequences of the adapters that leave, and for the load.
    What stands before an activated LoRA's invocation is read without the adapter. If that is still away then, the
    sequence gives its blocks back: who cannot run holds none. The prefix cache keeps what was read.

    **Ahead.** A plan may still be in flight when the next is made. That one goes on with the same sequences:
    the token that the plan in flight draws is PENDING in it. A sequence that this token ends has then run in
    vain; its slice is passed over at commit, as are those of sequences that were aborted, finished or
    preempted meanwhile. A sequence with penalties sits such a plan out, since its draw depends on that token.
    Plans must run in their order: a voided slice may write to blocks that have a new owner, who writes later.
    """

    def __init__(self, limits: StepLimits, blocks: BlockPool, turns: TenantTurns | None = None) -> None:
        self._limits, self._blocks = limits, blocks
        self._sequences: dict[SequenceKey, Sequence] = {}  # every live one
        self._siblings: dict[str, list[Sequence]] = {}  # the live ones of each live request
        self._running: list[Sequence] = []  # in order of admission
        self._waiting = WaitingSequences(turns or TenantTurns())
        self._ready: abc.Container[str] = ()
        self._overdue: AdapterRef | None = None
        self._in_flight = PlansInFlight()
        self._preemptions = 0
        self._waits_for_token = False
        self._short_blocks = 0

    def add(self, request: Request) -> None:
        """Queue the request's `n` sequences.

        Raises RequestRefused if the prompt is empty, the id is live, or it could not run even alone.
        """
        name = request.request_id
        if name in self._siblings:
            raise RequestRefused(f"request_id={name!r} is live already: give each live request its own")
        check_request(request, self._limits, self._blocks)
        size, longest = self._blocks.block_size, self._limits.max_model_len
        rotated_by = self._limits.rotated_by(len(request.prompt_token_ids))
        siblings = [Sequence(request, i, size, longest, rotated_by) for i in range(request.params.n)]
        self._siblings[name] = siblings
        self._sequences.update((sequence.key, sequence) for sequence in siblings)
        for sequence in siblings:
            self._waiting.add(sequence)

    def plan(
        self, now: float, ready: abc.Container[str], leaving: abc.Container[str] = (), rows: int = MOST_ROWS
    ) -> StepPlan:
        """Return the next step at time `now` (s), with the adapters `ready` (by digest) resident, and the base.

        Of those `leaving`, no waiting sequence is admitted. There are at most `rows`, but one for who decodes.
        """
        self._ready, self._overdue = ready, None
        draft = PlanDraft(min(self._limits.max_num_batched_tokens, max(rows, len(self._running) + 1)))
        self._plan_running(draft, now)
        self._plan_waiting(draft, now, leaving)
        self._waits_for_token = draft.waits_for_token
        plan = draft.plan()
        self._in_flight.add(plan, draft.sequences)
        return plan

    def commit(self, plan: StepPlan, outputs: abc.Sequence[SliceOutput]) -> tuple[TokenEvent, ...]:
        """Take in the plan's outputs, slice for slice; return what each sequence gained, in the plan's order.

        A plan made before this one that was not committed by now never will be: its step failed.
        """
        events: list[TokenEvent] = []
        size = self._blocks.block_size
        sequences = self._in_flight.begin_commit(plan)
        for sequence, part, output in zip(sequences, plan.slices, outputs, strict=True):
            if not sequence.in_flight or sequence.in_flight[0] is not part:
                continue  # it left, or lost its blocks, while the step ran
            event = sequence.commit(part, output)
            computed = sequence.computed_tokens
            if computed // size > sequence.published_blocks:
                sequence.publish_full(self._blocks)
            if part.start < sequence.prompt_tokens <= computed:
                self._release_siblings(sequence)
            if event is not None:
                events.append(event)
                self._waiting.drew(sequence)
                if event.finish_reason is not None:
                    self._retire(sequence)
        return tuple(events)

    def awaited(self, plan: StepPlan) -> tuple[Slice, ...]:
        """Return the slices of an uncommitted plan that their sequences still wait for: the rest are void."""
        return self._in_flight.awaited(plan)

    def retry(self, plan: StepPlan) -> StepPlan:
        """Plan again what is awaited of a plan whose step failed; later plans are void. See PlansInFlight."""
        return self._in_flight.retry(plan)

    def finish(self, key: SequenceKey) -> None:
        """End a sequence for a reason found outside, such as a stop string: no event follows. It may have ended."""
        if (sequence := self._sequences.get(key)) is not None:
            self._retire(sequence)

    def abort(self, request_id: str) -> None:
        """End all sequences of a request; nothing happens if there are none. No event follows."""
        for sequence in tuple(self._siblings.get(request_id, ())):
            self._retire(sequence)

    def late(self, now: float) -> tuple[str, ...]:
        """Return the requests that wait, never began, and whose first token was due before `now`."""
        return self._waiting.late(now)

    def wanted(self, limit: int) -> tuple[AdapterRef, ...]:
        """Return up to `limit` distinct adapters, not resident at the last plan, that live sequences need.

        What is overdue comes first, then those of running sequences, then those of waiting ones in their order.
        """
        wanted = {self._overdue.digest: self._overdue} if self._overdue is not None and limit else {}
        for sequence in chain(self._running, self._waiting):
            if len(wanted) >= limit:
                break
            if not self._is_ready(sequence):
                wanted.setdefault(sequence.request.adapter.digest, sequence.request.adapter)
        return tuple(wanted.values())

    def overdue(self) -> Overdue | None:
        """Return the first adapter that a sequence has been out of patience for at the last plan."""
        running = (sequence.adapter_digest for sequence in self._running)
        return self._overdue and Overdue(self._overdue, frozenset(each for each in running if each))

    def live(self) -> Live:
        """Return how many sequences wait and run, but for those in the background."""
        running = [each.running for each in self._sequences.values() if not each.request.background]
        return Live(running.count(False), running.count(True), self._preemptions)

    def block_stats(self) -> BlockStats:
        """Return where the K/V blocks are, and what the prefix cache has supplied."""
        return self._blocks.stats()

    def is_live(self, request_id: str) -> bool:
        """Return whether one of the request's sequences has not ended."""
        return request_id in self._siblings

    def short_blocks(self) -> int:
        """Return how many more K/V blocks the first in line would need, or the next step of those that run."""
        growing = len(self._running) - self._blocks.available
        return max(self._short_blocks, growing, 0)

    def waits_for_tokens(self) -> bool:
        """Return whether a sequence cannot be planned further before the latest plan is committed.

        Commit that plan before the next is made, or the sequence goes at half the pace.
        """
        return self._waits_for_token

    def _is_ready(self, sequence: Sequence) -> bool:
        return sequence.adapter_digest is None or sequence.adapter_digest in self._ready

    def _plan_running(self, draft: PlanDraft, now: float) -> None:
        """Give rows to the running sequences. As `commit` it runs for each: what can be read is not called."""
        ready = self._ready
        prompts: list[Sequence] = []
        for sequence in tuple(self._running):
            digest = sequence.adapter_digest
            if not sequence.running:
                continue
            if digest is not None and digest not in ready and not sequence.may_read_ahead:
                self._pass_over(sequence, now)
                if sequence.reads_ahead and not sequence.in_flight:
                    self._put_back(sequence)
                continue
            if sequence.drawing and not sequence.may_run_ahead:
                continue
            if sequence.expected_tokens - sequence.planned_tokens > 1:
                prompts.append(sequence)
            elif sequence.expected_tokens <= sequence.room_tokens or self._grow(sequence):
                draft.take(sequence)  # there is a row for each seat
        for sequence in prompts:
            if draft.rows and sequence.running:
                draft.take(sequence)

    def _plan_waiting(self, draft: PlanDraft, now: float, leaving: abc.Container[str]) -> None:
        before = len(self._running)
        for sequence in self._waiting:
            if not draft.rows or len(self._running) >= self._limits.most_running:
                break
            if sequence.waits_for_sibling:
                continue
            if not (self._is_ready(sequence) or sequence.has_to_read_ahead(self._blocks)):
                self._pass_over(sequence, now)
                continue
            if sequence.adapter_digest is not None and sequence.adapter_digest in leaving:
                continue
            if not self._admit(sequence):
                break
            draft.take(sequence)
        if len(self._running) > before:
            self._waiting.drop_running()

    def _pass_over(self, sequence: Sequence, now: float) -> None:
        if sequence.pass_over(now, self._limits.adapter_patience_s) and self._overdue is None:
            self._overdue = sequence.request.adapter

    def _admit(self, sequence: Sequence) -> bool:
        """Run the sequence, with blocks for all its tokens; false if they do not fit now."""
        blocks, may_share = self._blocks, sequence.shareable_blocks
        if sequence.no_room_at == blocks.releases:
            return False  # as short as before, without looking up a long prompt again in every step
        shared = blocks.lookup(sequence.digests(may_share))
        fresh = blocks.blocks_for(sequence.total_tokens) - len(shared)
        if not blocks.has_room(shared, fresh):
            sequence.no_room_at = blocks.releases
            if not sequence.request.background:  # which no adapter makes room for
                self._short_blocks = max(1, fresh - blocks.available)
            return False
        self._short_blocks = 0
        blocks.share(shared)
        sequence.hold(shared + blocks.allocate(fresh))
        sequence.published_blocks = len(shared)
        sequence.computed_tokens = sequence.planned_tokens = len(shared) * blocks.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed_tokens
            blocks.record_query(sequence.total_tokens if may_share else 0, sequence.computed_tokens)
        sequence.running = sequence.has_begun = True
        self._running.append(sequence)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence the block of its newest token; false if it had to be preempted itself."""
        while not self._blocks.available:
            victim = self._victim()
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.hold(self._blocks.allocate(1))
        return True

    def _victim(self) -> Sequence:
        stalled = (sequence for sequence in reversed(self._running) if not self._is_ready(sequence))
        return next(stalled, self._running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        self._preemptions += 1
        self._put_back(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """Let a running sequence wait, without its blocks."""
        sequence.reads_ahead = False
        self._running.remove(sequence)
        self._blocks.free(sequence.blocks)
        sequence.lose_blocks()
        self._waiting.put_first(sequence)

    def _release_siblings(self, sequence: Sequence) -> None:
        """Let go the siblings that waited for this sequence's prompt."""
        for sibling in self._siblings[sequence.key.request_id]:
            if sibling.waits_for_sibling:
                sibling.share_prompt_of(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Let a sequence go; its blocks stay in the prefix cache until they are needed."""
        (self._running if sequence.running else self._waiting).remove(sequence)
        self._blocks.free(sequence.blocks)
        sequence.lose_blocks()
        del self._sequences[sequence.key]
        siblings = self._siblings[sequence.key.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._siblings[sequence.key.request_id]
        if sequence.key.index == 0:
            for sibling in siblings:  # none waits for a first that left
                sibling.waits_for_sibling = False
