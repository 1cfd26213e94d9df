"""Keep, release, fill: from where adapters are to where the ceilings let them be, moving few bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.placement.builder import AssignmentBuilder
from scheduler.sim.ablations.ceiling_problem import CeilingProblem, ProblemArrays, idle_rate
from scheduler.sim.ablations.rank_ceilings import Floats
from scheduler.sim.ablations.release import Overload, cheapest_release

_NOTHING = 1e-9  # of tokens: less is a rounding error
_CRUMB = 1e-3  # a part of an adapter too small to be worth a copy


@dataclass(slots=True)
class _Block:
    """Tokens/s of one adapter on one node, or in the pool."""

    ref: AdapterRef
    tokens: float


class Packing:
    """One placement in the making; `keep`, `release` and `fill` in this order complete `builder`.

    An adapter that takes `hot` of a node's planned time is to have two copies; one not hot gives up shares
    below `minor`, so that what was once split grows together.
    """

    def __init__(self, arrays: ProblemArrays, ceilings: CeilingProblem, hot: float, minor: float) -> None:
        self._arrays, self._seconds, self._target = arrays, ceilings.seconds, ceilings.target
        self._minor = minor
        cheapest = self._seconds.min(0)
        choice = np.isfinite(self._seconds).sum(0) > 1
        self._hot_tokens = np.where(choice, hot * self._target / cheapest, np.inf)
        nodes = arrays.problem.nodes
        zones = {state.zone: at for at, state in enumerate(nodes)}
        self._zone = np.array([zones[state.zone] for state in nodes])
        self._idle = 2 * idle_rate(arrays.problem.demand)
        self._holding: dict[AdapterRef, list[int]] = {}
        for at, state in enumerate(nodes):
            for ref in state.held:
                self._holding.setdefault(ref, []).append(at)
        self.builder = AssignmentBuilder(arrays.problem)
        self._here: list[list[_Block]] = [[] for _ in nodes]
        self._pool: list[_Block] = []

    def keep(self) -> None:
        """Let every share stay that may stay under its node's ceiling; the rest goes to the pool."""
        stay: dict[AdapterRef, dict[int, float]] = {ref: {} for ref in self._arrays.demand}
        for ref, node, part in self._arrays.before:
            if np.isfinite(self._seconds[node, self._level(ref)]):
                stay[ref][node] = part
        load = np.zeros(len(self._here))
        for ref, parts in stay.items():
            for node, part in parts.items():
                load[node] += self._busy(ref, node, part)
        for ref, parts in stay.items():
            parts = self._halved(parts) if self._is_hot(ref) else self._gathered(ref, parts, load)
            for node, part in parts.items():
                self._here[node].append(_Block(ref, self._arrays.demand[ref] * part))
            left = 1.0 - sum(parts.values())
            if left > _NOTHING:
                self._pool.append(_Block(ref, self._arrays.demand[ref] * left))

    def release(self) -> None:
        """Send to the pool what the cheapest flow takes from each node, and what memory cannot hold; book the
        rest."""
        release = cheapest_release(self._overload(), self._seconds, self._target)
        self._target = release.target
        for node, blocks in enumerate(self._here):
            by_level: dict[int, list[_Block]] = {}
            for block in blocks:
                by_level.setdefault(self._level(block.ref), []).append(block)
            kept: list[_Block] = []
            for level, mine in by_level.items():
                kept += self._give(mine, float(release.tokens[node, level]))
            for block in sorted(kept, key=lambda block: -block.tokens):
                if self.builder.fits(block.ref, node):
                    self._put(block, node, block.tokens)
                else:
                    self._pool.append(block)

    def fill(self) -> None:
        """Place the pool: the largest rank first, as it has the fewest nodes to go to, then by demand."""
        for block in sorted(self._pool, key=lambda block: (-block.ref.rank, -block.tokens)):
            for node in self._free_of_charge(block):
                self._put(block, node, min(block.tokens, self._spare(node, block.ref)))
            while block.tokens > _NOTHING * self._arrays.demand[block.ref]:
                node, tokens = self._choose(block) or (0, 0.0)
                if tokens <= _NOTHING * block.tokens:
                    self._overfill(block)
                    break
                self._put(block, node, min(tokens, block.tokens))

    def _level(self, ref: AdapterRef) -> int:
        return self._arrays.level[ref.rank]

    def _is_hot(self, ref: AdapterRef) -> bool:
        return self._arrays.demand[ref] >= self._hot_tokens[self._level(ref)]

    def _busy(self, ref: AdapterRef, node: int, part: float) -> float:
        """Return the utilisation of `node` by that part of the adapter's demand."""
        return part * self._arrays.demand[ref] * float(self._seconds[node, self._level(ref)])

    def _halved(self, parts: dict[int, float]) -> dict[int, float]:
        """Let half of a hot adapter's only copy leave it."""
        return {node: min(part, 0.5) for node, part in parts.items()} if len(parts) == 1 else parts

    def _gathered(self, ref: AdapterRef, parts: dict[int, float], load: Floats) -> dict[int, float]:
        """Let minor parts join the largest where that has time for them; `load` [nodes] is kept up."""
        if len(parts) < 2:
            return parts
        kept = dict(parts)
        largest = max(kept, key=lambda node: kept[node])
        for node, part in parts.items():
            joined = load[largest] + self._busy(ref, largest, part)
            if node != largest and part < self._minor and joined <= self._target:
                load[largest] = joined
                load[node] -= self._busy(ref, node, part)
                kept[largest] += kept.pop(node)
        return kept

    def _overload(self) -> Overload:
        tokens, nbytes = np.zeros_like(self._seconds), np.zeros_like(self._seconds)
        for node, blocks in enumerate(self._here):
            for block in blocks:
                tokens[node, self._level(block.ref)] += block.tokens
                nbytes[node, self._level(block.ref)] += block.ref.nbytes
        pool_tokens, pool_bytes = np.zeros_like(self._arrays.wanted), np.zeros_like(self._arrays.wanted)
        for block in self._pool:
            pool_tokens[self._level(block.ref)] += block.tokens
            pool_bytes[self._level(block.ref)] += block.ref.nbytes
        return Overload(tokens, nbytes, pool_tokens, pool_bytes, self.builder.free_bytes - nbytes.sum(1))

    def _give(self, blocks: list[_Block], tokens: float) -> list[_Block]:
        """Send `tokens`/s of one rank's blocks to the pool, the busiest first since their bytes are alike:
        whole ones while they fit into what is to go, then the smallest that covers the rest. Returns those
        that stay."""
        enough = 1e-6 * sum(block.tokens for block in blocks)
        kept: list[_Block] = []
        for block in sorted(blocks, key=lambda block: -block.tokens):
            if enough < block.tokens <= tokens:
                tokens -= block.tokens
                self._pool.append(block)
            else:
                kept.append(block)
        covering = [block for block in kept if block.tokens >= tokens > enough]
        if covering and self._is_hot(covering[-1].ref):
            covering[-1].tokens -= tokens
            self._pool.append(_Block(covering[-1].ref, tokens))
        elif covering:
            kept.remove(covering[-1])
            self._pool.append(covering[-1])
        return kept

    def _put(self, block: _Block, node: int, tokens: float) -> None:
        if tokens <= 0:
            return
        seconds = float(self._seconds[node, self._level(block.ref)])
        if np.isinf(seconds):
            seconds = 1 / float(self._arrays.rates[node, self._level(block.ref)])
        self.builder.take(block.ref, node, tokens / self._arrays.demand[block.ref], tokens * seconds)
        block.tokens -= tokens

    def _spare(self, node: int, ref: AdapterRef) -> float:
        """Return tokens/s of `ref` that `node` has time for; 0 if that is hardly worth a copy which is not
        there yet."""
        spare = (self._target - float(self.builder.load[node])) / float(self._seconds[node, self._level(ref)])
        least = 0.0 if node in self.builder.holders(ref) else _CRUMB * self._arrays.demand[ref]
        return spare if spare > least else 0.0

    def _free_of_charge(self, block: _Block) -> Iterator[int]:
        """Find the nodes that have the adapter in this placement, then those that hold its bytes anyway.

        A hot one's second copy is to be another.
        """
        taken = self.builder.holders(block.ref)
        if len(taken) > 1 or not self._is_hot(block.ref):
            yield from taken
        for node in self._holding.get(block.ref, ()):
            allowed = np.isfinite(self._seconds[node, self._level(block.ref)])
            if allowed and node not in taken and self.builder.fits(block.ref, node):
                yield node

    def _choose(self, block: _Block) -> tuple[int, float] | None:
        """Find the node with most to spare, and the tokens/s it takes; None if none has time and memory.

        New copies go to another zone if they can. Nodes that have the adapter come last, as they have been
        asked before. Idle adapters go by memory.
        """
        ref, seconds = block.ref, self._seconds[:, self._level(block.ref)]
        taken = list(self.builder.holders(ref))
        holding = np.zeros(len(seconds), dtype=bool)
        holding[taken] = True
        fresh = np.isfinite(seconds) & (self.builder.free_bytes >= ref.nbytes) & ~holding
        if self._arrays.demand[ref] <= self._idle and fresh.any():
            return int(np.argmax(np.where(fresh, self.builder.free_bytes, -np.inf))), block.tokens
        apart = fresh & ~np.isin(self._zone, self._zone[taken])
        for choice in (apart, fresh) if taken else (fresh,):
            spare = np.where(choice, (self._target - self.builder.load) / seconds, -np.inf)
            node = int(np.argmax(spare))
            tokens = min(float(spare[node]), self._half_if_first(ref, taken))
            if tokens > _CRUMB * self._arrays.demand[ref]:
                return node, tokens
        return max(((node, self._spare(node, ref)) for node in taken), key=lambda each: each[1], default=None)

    def _half_if_first(self, ref: AdapterRef, taken: list[int]) -> float:
        demand = self._arrays.demand[ref]
        return demand / 2 if not taken and self._is_hot(ref) else demand

    def _overfill(self, block: _Block) -> None:
        """Put what no node has time for onto the least loaded that may take it or has it.

        Else it goes to one above whose ceiling it is; nowhere if there is no memory.
        """
        having = self.builder.free_bytes >= block.ref.nbytes
        having[list(self.builder.holders(block.ref))] = True
        for allowed in (having & np.isfinite(self._seconds[:, self._level(block.ref)]), having):
            if allowed.any():
                self._put(block, int(np.argmin(np.where(allowed, self.builder.load, np.inf))), block.tokens)
                return
