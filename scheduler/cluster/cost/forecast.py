"""Forecast what a node's steps will take on the average while requests come to it at known rates.

It is the load that our placement levels and our routing compares. In the steady state of continuous batching a
node gets λ requests/s of P prompt and O output tokens. In a step of T seconds it reads λ·P·T prompt tokens and
draws λ·O·T. By Little's law an adapter asked for at λ_a has λ_a·O·T requests in the batch. So it is there with
probability 1 - exp(-λ_a·O·T). The largest rank there is at least r with probability

    1 - exp(-Σ λ_a·O·T over ranks ≥ r).

Steps have seconds of their own (the base, and what each distinct adapter costs) and seconds that come with
requests, hence

    T = (base + adapters there) / (1 - Σ λ · seconds of a request).

Operating points, in contrast, take every request to be of another adapter and the largest rank of a node to be
in every batch. That makes few popular adapters of a large rank seem several times as costly as they are. Knows
no node and no placement: rates in, seconds out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.cluster.cost.model import CostModel, Kernel, by_kernel
from scheduler.cluster.cost.pace import AS_PROFILED, Pace
from scheduler.cluster.cost.profile import Lengths, Limits

Floats = NDArray[np.float64]

_MOST_KEPT = 512  # forecasts of other paces
ROOMY = Limits(step_prompt_tokens=2048, kv_tokens=1 << 62)  # K/V for whatever comes
_FULL = (
    0.98  # the part of a node's time taken by requests beyond which steps are not told to grow without end
)


@dataclass(frozen=True, slots=True)
class AdapterRates:
    """Adapters as arrays of [adapters]: how many of their requests come in a second, and their ranks."""

    rates: Floats
    ranks: Floats


class ForecastBatch(NamedTuple):
    """What is on a node now: sequences that decode (or will soon), and the tokens of K/V they read.

    Of the distinct adapters it says their number, the sum of their ranks and the largest.
    """

    sequences: float
    context_tokens: float
    adapters: int
    rank_sum: int
    largest: int


class Forecast:
    """Forecasts of nodes with the steps of `model` and room for what `limits` say, for requests of the mean
    `lengths`.

    `request_s` is a node's time that a request takes, its adapter apart. `others` are the profile's models of
    other kernels.
    """

    def __init__(
        self, model: CostModel, lengths: Lengths, limits: Limits = ROOMY, others: Sequence[CostModel] = ()
    ) -> None:
        self.model, self.lengths, self.limits = model, lengths, limits
        self._models = by_kernel((model, *others))
        self._found: dict[tuple[Kernel | None, Pace], Forecast] = {}
        self._batch_cost = self._costs_of_batches()
        prompt, output = lengths.prompt_tokens, lengths.output_tokens
        self.request_s = (
            prompt * model.prefill_token_s
            + output * model.decode_sequence_s
            + output * (prompt + output / 2) * model.context_token_s
            + (prompt + output) * model.adapter_token_s
            + prompt * prompt / 2 * model.prompt_pair_s
        )

    def of(self, kernel: Kernel | None, pace: Pace) -> "Forecast":
        """Return the forecast of a node that told this kernel (None: the profile's) and pace, to about 5 %.

        Forecasts are kept, so that asking for one again costs next to nothing.
        """
        found = self._found.get((kernel, pace))
        if found is None:
            found = self._of_rounded(kernel or self.model.kernel, pace.rounded())
            if len(self._found) >= _MOST_KEPT:
                self._found.clear()
            self._found[kernel, pace] = found
        return found

    def rates(self, tokens_per_s: Floats) -> Floats:
        """Return requests/s from input plus output tokens/s."""
        return tokens_per_s / (self.lengths.prompt_tokens + self.lengths.output_tokens)

    def features(self, adapters: AdapterRates, step_s: Floats | float, levels: Sequence[int]) -> Floats:
        """Return [features, adapters]: what each adapter brings to a step of about `step_s`.

        They are to be summed over the adapters of a node and given to `steps`. `levels` are the ranks there
        are, ascending.
        """
        decoding = adapters.rates * (self.lengths.output_tokens * step_s)
        there = 1 - np.exp(-decoding)
        reading = 1 - np.exp(-adapters.rates * step_s)
        rows = (
            adapters.rates,
            there,
            there * adapters.ranks,
            reading,
            reading * adapters.ranks,
            adapters.rates * adapters.ranks,
        )
        at_least = [np.where(adapters.ranks >= level, decoding, 0.0) for level in levels]
        return np.stack([*rows, *at_least])

    def steps(self, sums: Floats, levels: Sequence[int], slowdown: Floats | float = 1.0) -> Floats:
        """Forecast [nodes] seconds of a step from sums of features [features, nodes].

        The nodes' steps take `slowdown` times as long. Beyond what a node can take they go on growing,
        finitely.
        """
        model = self.model
        rates, adapters = sums[0], sums[1]
        largest = self._largest(sums[6:], levels)
        rows, token_ranks = self._rank_work(sums, largest)
        own = model.base_s + model.rank_row_s * rows + model.adapter_s * adapters
        taken = rates * self.request_s + model.token_rank_s * token_ranks
        tokens = rates * (self.lengths.prompt_tokens + self.lengths.output_tokens)
        plain = _solved(own * slowdown, taken * slowdown)
        if not model.crowded_row_s:
            return plain
        crowded = own - model.crowded_row_s * model.knee_rows
        return np.maximum(
            plain, _solved(crowded * slowdown, (taken + model.crowded_row_s * tokens) * slowdown)
        )

    def seconds(self, batch: ForecastBatch) -> tuple[float, float]:
        """Forecast the seconds of the steps that `batch` will see, first of those in which no prompt is read.

        In the mean step each sequence brings its part of a prompt to read. Routing asks for each node that it
        considers, so what does not depend on the batch was worked out before.
        """
        sequences, context_tokens, adapters, rank_sum, largest = batch
        cost = self._batch_cost
        mean = (cost.fixed_rank or rank_sum / adapters) if adapters else 0.0
        common_s = (
            cost.base_s
            + context_tokens * cost.context_token_s
            + rank_sum * cost.rank_s
            + adapters * (cost.adapter_s + largest * cost.largest_s)
        )
        decode_s = common_s + sequences * cost.decode_s
        return decode_s, common_s + sequences * (
            cost.sequence_s + mean * cost.mean_rank_s + largest * cost.largest_rank_s
        )

    def step_s(self, batch: ForecastBatch) -> float:
        """Forecast the mean step that `batch` will see."""
        return self.seconds(batch)[1]

    def decode_s(self, batch: ForecastBatch) -> float:
        """Forecast the part of a step's seconds that is not for reading prompts."""
        return self.seconds(batch)[0]

    def _of_rounded(self, kernel: Kernel, pace: Pace) -> "Forecast":
        """Return the one forecast of this kernel and this rounded pace."""
        if kernel is self.model.kernel and pace == AS_PROFILED:
            return self
        found = self._found.get((kernel, pace))
        if found is None:
            model = self._models.get(kernel) or self.model
            found = self._found[kernel, pace] = Forecast(pace.of(model), self.lengths, self.limits)
        return found

    def _costs_of_batches(self) -> "_BatchCost":
        """Sum up what each of a batch's figures costs, whatever the batch."""
        model, kernel = self.model, self.model.kernel
        prompts = self.lengths.prompt_tokens / self.lengths.output_tokens  # tokens read for each token drawn
        padded, own = kernel is Kernel.PADDED, kernel in (Kernel.EXACT, Kernel.MULTI_RANK)
        return _BatchCost(
            fixed_rank=model.fixed_rank,
            base_s=model.base_s,
            context_token_s=model.context_token_s,
            rank_s=model.rank_row_s * own,
            adapter_s=model.adapter_s + model.rank_row_s * model.fixed_rank,
            largest_s=model.rank_row_s * padded,
            decode_s=model.decode_sequence_s,
            sequence_s=model.decode_sequence_s + prompts * (model.prefill_token_s + model.adapter_token_s),
            mean_rank_s=model.token_rank_s * ((not padded) + prompts * (not kernel.mixes)),
            largest_rank_s=model.token_rank_s * (padded + prompts * kernel.mixes),
        )

    def _largest(self, decoding: Floats, levels: Sequence[int]) -> Floats:
        """Return the expected largest rank there, given that any adapter is."""
        there = 1 - np.exp(-decoding)
        steps = np.diff(np.array([0, *levels], dtype=np.float64))
        return np.tensordot(steps, there, axes=1) / np.maximum(there[0], 1e-12)

    def _rank_work(self, sums: Floats, largest: Floats) -> tuple[Floats, Floats]:
        """Rank rows of a step, and token ranks of a second."""
        rates, adapters, own_rows, reading, reading_rows, rank_rates = sums[:6]
        prompt, output = self.lengths.prompt_tokens, self.lengths.output_tokens
        match self.model.kernel:
            case Kernel.EXACT:
                return own_rows, rank_rates * (prompt + output)
            case Kernel.PADDED:
                return largest * adapters, rates * largest * (prompt + output)
            case Kernel.FIXED:
                fixed = self.model.fixed_rank
                return fixed * adapters, fixed * (prompt + output) * rates
            case Kernel.MULTI_RANK:
                rows = reading * largest + own_rows - reading_rows
                return rows, rates * largest * prompt + rank_rates * output


def _solved(own: Floats, taken: Floats) -> Floats:
    left = np.maximum(1 - taken, 1 - _FULL)
    return own / left * (1 + np.maximum(0.0, taken - _FULL) / (1 - _FULL))


@dataclass(frozen=True, slots=True)
class _BatchCost:
    """Seconds of a step, and for each of what a `ForecastBatch` counts.

    `rank_s` is for each rank of `rank_sum`, `largest_s` for each rank of `largest` and each adapter;
    `mean_rank_s` and `largest_rank_s` for each rank and sequence. `fixed_rank` is what every rank counts as, if
    not 0.
    """

    fixed_rank: int
    base_s: float
    context_token_s: float
    rank_s: float
    adapter_s: float
    largest_s: float
    decode_s: float
    sequence_s: float
    mean_rank_s: float
    largest_rank_s: float
