"""The capacity planner's answer as a picture. Nothing else here needs matplotlib."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from scheduler.sim.planner.search import Need, PlanQuestion

_KINDS = (".png", ".pdf", ".svg", ".jpg")  # what matplotlib writes without further programs


class CannotDraw(RuntimeError):
    """A figure was asked for where matplotlib is not installed, or of a kind that it cannot write; says the
    remedy."""


def check_drawable(path: Path) -> None:
    """Raises CannotDraw if `draw` could not write a picture of the suffix of `path`."""
    try:
        import_module("matplotlib.figure")  # optional: only figures need it
    except ImportError as error:
        raise CannotDraw(
            f"--figure {path}: this needs matplotlib: pip install matplotlib, or leave --figure out"
        ) from error
    if path.suffix.lower() not in _KINDS:
        raise CannotDraw(f"--figure {path}: give a file that ends in one of {', '.join(_KINDS)}")


def draw(question: PlanQuestion, needs: Sequence[Need], path: Path) -> None:
    """Write a picture: nodes that each policy needs, and P95 of both times over the nodes that were tried.
    `check_drawable` says beforehand whether it can."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # optional: only figures need it

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    bars, ttft, tbt = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    names = [need.policy.name for need in needs]
    counts = [need.best.nodes for need in needs]
    drawn = bars.barh(names, counts, color=[f"C{at}" for at in range(len(needs))])
    bars.bar_label(
        drawn, [f"{need.best.nodes}" if need.fewest else f">{need.best.nodes}" for need in needs], padding=3
    )
    bars.invert_yaxis()
    bars.set_xlabel("nodes needed")
    bars.margins(x=0.15)
    for axes, title, bound, scale in (
        (ttft, "P95 time to first token, s", question.slo.ttft_s, 1.0),
        (tbt, "P95 time between tokens, ms", 1e3 * question.slo.tbt_s, 1e3),
    ):
        for at, need in enumerate(needs):
            finished = [trial for trial in need.trials if trial.replay.finished]
            outcomes = [trial.replay.outcome for trial in finished]
            values = [scale * (each.ttft_p95_s if axes is ttft else each.tbt_p95_s) for each in outcomes]
            axes.plot(
                [trial.nodes for trial in finished], values, "o-", color=f"C{at}", label=need.policy.name
            )
        axes.axhline(bound, color="black", linestyle=":", linewidth=1)
        axes.set_xlabel("nodes")
        axes.set_ylabel(title)
        axes.set_yscale("log")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted("{x:g}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    tbt.legend(fontsize=7)
    figure.savefig(path, dpi=150)
