"""The figures of `load.py` as a picture: time against ours, with intervals and claims."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import AUTOPILOT
from benchmarks.contest import Result


def draw(results: Sequence[Result], target: Path) -> None:
    """One panel for each case: how many times as long as ours each loader took (left of 1: faster than ours).

    Points are medians of paired ratios, bars their intervals; loaders without pairs are ratios of medians,
    hollow. A mark under a row is where the claim ends.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if len(result.rows) > 1]
    if not shown:
        return
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    heights = [
        1.2 + 0.3 * max(len(result.rows) for result in shown[at : at + columns])
        for at in range(0, len(shown), columns)
    ]
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(7.5 * columns, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for number, result in enumerate(shown):
        _panel(axes[number // columns][number % columns], result)
    for number in range(len(shown), lines * columns):
        axes[number // columns][number % columns].set_axis_off()
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _panel(axis: Any, result: Result) -> None:
    ratios = result.ratios()
    limits = {claim.rival: claim.limit for claim in result.case.claims}
    if result.case.autopilot and (best := result.best_fixed()) is not None:
        limits[best] = AUTOPILOT
    mine = statistics.median(result.rows[result.case.ours].figure("wall", result.size))
    names = [name for name, row in result.rows.items() if row.outcomes and name != result.case.ours]
    for place, name in enumerate(names):
        if name in ratios:
            low, middle, high = (
                1 / ratios[name].high,
                1 / ratios[name].median,
                1 / ratios[name].low,
            )
            axis.errorbar(
                middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color="C0", capsize=3
            )
        else:
            middle = statistics.median(result.rows[name].figure("wall", result.size)) / mine
            axis.plot(middle, place, "o", color="C0", fillstyle="none")
        axis.annotate(
            f"{middle:.2f}", (middle, place), textcoords="offset points", xytext=(0, 5), ha="center", size=7
        )
        if name in limits:
            axis.plot(1 / limits[name], place, "|", color="C3", markersize=14)
    axis.axvline(1, color="0.5", linewidth=0.8)
    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.45), max(high, 2.2))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.7)
    axis.set_xlabel(f"time / {result.case.ours} ({mine:.2f} s); red: the claim")
    axis.set_title(f"{result.case.name}: {result.case.title}", fontsize=9)
