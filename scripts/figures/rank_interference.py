"""Show rank interference by cost model: what a request of rank 8 waits for as its neighbours' ranks grow.

    python -m scripts.figures.rank_interference

It is one step of a derived H100 node with Llama-3.1-8B under exact, multi-rank, padded and fixed kernels. Time
between tokens is a step in which all decode with 1,024 tokens of context each. Time to first token is one in
which all prompts of 256 tokens are read. There are two batches: one of rank 8 with 31 neighbours of the rank
in question, and 31 of rank 8 with one such neighbour.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence

from matplotlib.figure import Figure

from scheduler.cluster.cost.model import AdapterLoad, Kernel, StepLoad
from scheduler.cluster.cost.profile import Slo
from scripts.figures.roofline import H100, LLAMA_8B, derived
from scripts.figures.suite import Suite, SuiteWork, main
from scripts.results import Row

PROFILE = derived(LLAMA_8B, H100, Slo(2.0, 0.05))
RANKS = (8, 16, 32, 64, 128)
BATCHES = {"one of rank 8, 31 neighbours": (1, 31), "31 of rank 8, one neighbour": (31, 1)}
CONTEXT_TOKENS, PROMPT_TOKENS = 1024, 256
STYLES = {
    "exact": ("C0", "o-", 5),
    "multi-rank": ("C1", "s--", 2.5),
    "padded": ("C3", "^:", 2),
    "fixed": ("C7", "-.", 1),
}


def step_s(kernel: Kernel, small: int, neighbours: int, rank: int, metric: str) -> float:
    """Predict the seconds of the step; every sequence has an adapter of its own."""
    prompt, drawn = (PROMPT_TOKENS, 0) if metric == "ttft" else (0, 1)
    ranks = [8] * small + [rank] * neighbours
    context = len(ranks) * (CONTEXT_TOKENS if drawn else PROMPT_TOKENS)
    load = StepLoad(tuple(AdapterLoad(each, prompt, drawn) for each in ranks), context)
    return PROFILE.model(kernel).step_s(load)


def ask(work: SuiteWork) -> None:
    """Compute all times; that is quick in any case."""
    for batch, (small, neighbours) in BATCHES.items():
        for metric in ("ttft", "tbt"):
            for kernel in Kernel:
                for rank in RANKS:
                    asked = {
                        "company": batch,
                        "metric": metric,
                        "kernel": kernel.value,
                        "neighbour_rank": rank,
                        "hardware": PROFILE.hardware,
                        "base_model": PROFILE.base_model,
                        "provenance": PROFILE.provenance,
                    }
                    seconds = step_s(kernel, small, neighbours, rank, metric)
                    work.rows.ask(asked, lambda seconds=seconds: {"seconds": round(seconds, 6)})


def draw(rows: Sequence[Row]) -> Figure:
    """Draw a panel for each batch and metric."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    names = {"ttft": "time to first token, ms", "tbt": "time between tokens, ms"}
    for line, batch in zip(panels, BATCHES, strict=True):
        for axes, metric in zip(line, ("tbt", "ttft"), strict=True):
            for kernel, (colour, line_style, width) in STYLES.items():
                mine = [row for row in rows if _is(row, batch, metric, kernel)]
                ranks = [row["asked"]["neighbour_rank"] for row in mine]
                times = [1e3 * row["seconds"] for row in mine]
                axes.plot(ranks, times, line_style, color=colour, linewidth=width, label=kernel)
            axes.set_xscale("log", base=2)
            axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
            axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
            axes.set_ylabel(names[metric])
            axes.set_title(batch, fontsize=10)
    for axes in panels[1]:
        axes.set_xlabel("rank of the neighbours")
    panels[0][0].legend()
    return figure


def _is(row: Row, batch: str, metric: str, kernel: str) -> bool:
    asked = row["asked"]
    return (asked["company"], asked["metric"], asked["kernel"]) == (batch, metric, kernel)


SUITE = Suite("rank_interference", __doc__ or "", ask, {"rank_interference": draw})

if __name__ == "__main__":
    main(SUITE)
