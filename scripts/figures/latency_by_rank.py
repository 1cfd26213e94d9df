"""Show time to first token and between tokens by rank, over input size, model size and tensor parallelism.

    python -m scripts.figures.latency_by_rank

Times are by derived cost models. The time to first token is that of a prompt alone on a node, in steps of as
many tokens as the profile allows. The time between tokens is that of 32 sequences, each with its own adapter
of the rank, whose context is the input. Relative times are those of rank r over those of rank 8 at 1,024
tokens.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad
from scheduler.cluster.cost.profile import Profile, Slo
from scripts.figures.roofline import H100, LLAMA_1B, LLAMA_8B, LLAMA_70B, RooflineModel, derived
from scripts.figures.suite import Suite, SuiteWork, main
from scripts.results import Row

RANKS = (8, 16, 32, 64, 128)
INPUTS = (128, 256, 512, 1024, 2048, 4096, 8192)
SEQUENCES = 32
NODES = (
    (LLAMA_1B, 1),
    (LLAMA_8B, 1),
    (LLAMA_8B, 2),
    (LLAMA_8B, 4),
    (LLAMA_8B, 8),
    (LLAMA_70B, 4),
    (LLAMA_70B, 8),
)


def ttft_s(model: CostModel, rank: int, tokens: int, chunk: int) -> float:
    """Predict the time to first token of a prompt alone, read in chunks."""
    ends = [*range(chunk, tokens, chunk), tokens]
    return sum(
        model.step_s(StepLoad((AdapterLoad(rank, end - start, 0),), end))
        for start, end in zip([0, *ends], ends, strict=False)
    )


def tbt_s(model: CostModel, rank: int, tokens: int) -> float:
    """Predict the time between tokens of 32 sequences that all decode."""
    return model.step_s(StepLoad((AdapterLoad(rank, 0, 1),) * SEQUENCES, SEQUENCES * tokens))


def ask(work: SuiteWork) -> None:
    """Compute all times; that is quick in any case."""
    for shape, split in NODES:
        profile = derived(shape, H100, Slo(2.0, 0.05), split)
        for row, times in _answers(profile, shape, split):
            work.rows.ask(row, lambda times=times: times)


def _answers(profile: Profile, shape: RooflineModel, split: int) -> Iterator[tuple[Row, Row]]:
    model = profile.model(Kernel.EXACT)
    for rank in RANKS:
        for tokens in INPUTS:
            asked = {"model": shape.name, "tensor_parallel": split, "rank": rank, "input_tokens": tokens}
            asked |= {"hardware": profile.hardware, "provenance": profile.provenance}
            first_s = ttft_s(model, rank, tokens, profile.limits.step_prompt_tokens)
            yield asked, {"ttft_s": round(first_s, 6), "tbt_s": round(tbt_s(model, rank, tokens), 6)}


def _time(rows: Sequence[Row], name: str, split: int, rank: int, tokens: int, metric: str) -> float:
    asked = {"model": name, "tensor_parallel": split, "rank": rank, "input_tokens": tokens}
    return next(row[metric] for row in rows if asked.items() <= row["asked"].items())


def _by_input(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    for at, rank in enumerate(RANKS):
        times = [1e3 * _time(rows, LLAMA_8B.name, 1, rank, tokens, metric) for tokens in INPUTS]
        axes.plot(INPUTS, times, "o-", color=f"C{at}", markersize=3, label=f"rank {rank}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("input tokens")


def _relative(axes: Axes, rows: Sequence[Row], nodes: Sequence[tuple[str, int, str]], metric: str) -> None:
    for name, split, label in nodes:
        times = [_time(rows, name, split, rank, 1024, metric) for rank in RANKS]
        axes.plot(RANKS, [each / times[0] for each in times], "o-", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.set_xlabel("rank")
    axes.set_ylim(bottom=0.98)
    axes.legend(fontsize=8)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw a line for each metric: by input, by model, by degree."""
    models = [(LLAMA_1B.name, 1, "1B"), (LLAMA_8B.name, 1, "8B"), (LLAMA_70B.name, 4, "70B on four")]
    degrees = [(LLAMA_8B.name, split, f"8B on {split}") for split in (1, 2, 4, 8)]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    names = {"ttft_s": "time to first token", "tbt_s": f"time between tokens, {SEQUENCES} sequences"}
    panels = figure.subplots(2, 3)
    for (by_input, by_model, by_degree), (metric, name) in zip(panels, names.items(), strict=True):
        _by_input(by_input, rows, metric)
        by_input.set_ylabel(f"{name}, ms", fontsize=9)
        _relative(by_model, rows, models, metric)
        _relative(by_degree, rows, degrees, metric)
        by_model.set_ylabel("relative to rank 8", fontsize=9)
    panels[0][0].set_yscale("log")
    panels[0][0].legend(fontsize=8)
    for axes, title in zip(
        panels[0], ("Llama-3.1-8B, one H100", "by model", "by GPUs it is split over"), strict=True
    ):
        axes.set_title(title, fontsize=10)
    return figure


SUITE = Suite("latency_by_rank", __doc__ or "", ask, {"latency_by_rank": draw})

if __name__ == "__main__":
    main(SUITE)
