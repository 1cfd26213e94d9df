"""Timed steps as rows of a results file, and the cost model that is fitted to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scheduler.cluster.cost.fit import HeldOutError, Measurement, fit, held_out_error
from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad
from scripts.profile_node.live_engine import LIMITS, LiveEngine
from scripts.results import Row


def node_row(node: LiveEngine) -> Row:
    """Say what the steps after this line ran on."""
    return {
        "what": "node",
        "hardware": node.hardware,
        "base_model": node.base_model,
        "step_prompt_tokens": LIMITS.max_num_batched_tokens,
        "kv_tokens": node.capacity.kv_blocks * node.capacity.block_tokens,
    }


def to_row(measured: Measurement) -> Row:
    """Make one line of the rows' file; an adapter is [rank, prompt tokens, decoding sequences]."""
    load = measured.load
    return {
        "what": "step",
        "adapters": [[part.rank, part.prefill_tokens, part.decode_sequences] for part in load.adapters],
        "context_tokens": load.context_tokens,
        "prompt_pairs": load.prompt_pairs,
        "step_s": round(measured.step_s, 7),
    }


def from_row(row: Row) -> Measurement:
    """Read what `to_row` wrote."""
    adapters = tuple(AdapterLoad(*part) for part in row["adapters"])
    return Measurement(StepLoad(adapters, row["context_tokens"], row["prompt_pairs"]), row["step_s"])


def means(rows: Sequence[Measurement]) -> list[Measurement]:
    """Reduce each kind of step to one with the mean of its seconds, in order of first appearance.

    The mean, though the median is steadier: what a shared machine adds now and then, serving waits for too.
    """
    seconds: dict[StepLoad, list[float]] = {}
    for row in rows:
        seconds.setdefault(row.load, []).append(row.step_s)
    return [Measurement(load, fmean(each)) for load, each in seconds.items()]


@dataclass(frozen=True, slots=True)
class FittedModel:
    """A model, its error on steps that it had not seen, and how many steps of how many kinds there were."""

    model: CostModel
    error: HeldOutError
    kinds: int
    steps: int


def fitted(rows: Sequence[Measurement]) -> FittedModel:
    """Fit to the means and hold out. Raises TooFewMeasurements."""
    kinds = means(rows)
    return FittedModel(fit(kinds, Kernel.EXACT), held_out_error(kinds, Kernel.EXACT), len(kinds), len(rows))
