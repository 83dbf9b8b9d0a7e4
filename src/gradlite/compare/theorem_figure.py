"""The theorem's picture: suboptimality against T with fitted lines, floor against rank, floor by memory; a row a problem."""

import math
from pathlib import Path
from typing import Any, TypeGuard

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = {
    "exact SGD": "black",
    "no feedback, static random basis": "C3",
    "no feedback, tracked basis": "C1",
    "feedback, exact residual, full memory": "C0",
    "feedback, sampled residual, full memory": "C2",
}


def draw_theorem(record: dict[str, Any], path: Path) -> None:
    """Draw a finished record's panels into a PNG file. Runs that diverged are left out of the curves and named in the bars."""
    problems = list(dict.fromkeys(point["problem"] for point in record["points"]))
    figure = Figure(figsize=(17, 4.6 * len(problems)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(problems), 3, squeeze=False, width_ratios=(1.1, 1, 1))
    for row, problem in zip(panels, problems, strict=True):
        _draw_slopes(row[0], record, problem)
        _draw_ranks(row[1], record, problem)
        _draw_memories(row[2], record, problem)
    figure.savefig(path, dpi=110)


def _finite(value: float | None) -> TypeGuard[float]:
    """What diverged is null in a file, and NaN before it was in one."""
    return value is not None and math.isfinite(value)


def _draw_slopes(axes: Axes, record: dict[str, Any], problem: str) -> None:
    slopes = {entry["variant"]: entry for entry in record["summary"]["slopes"]
              if entry["problem"] == problem and entry["experiment"] == "slope"}  # fmt: skip
    points = [p for p in record["points"] if p["problem"] == problem and p["experiment"] == "slope"]
    for variant, entry in slopes.items():
        mine = [(p["steps"], p["suboptimality"]) for p in points if p["variant"] == variant and _finite(p["suboptimality"])]
        if not mine:
            continue
        steps = [step for step, _ in mine]
        colour, slope = _COLOURS[variant], entry["slope"]
        axes.scatter(steps, [value for _, value in mine], color=colour, s=14)
        # The fitted line runs through the mean of the logarithms.
        x0 = sum(math.log(step) for step in steps) / len(steps)
        y0 = sum(math.log(value) for _, value in mine) / len(mine)
        ends = sorted(set(steps))
        label = f"{variant}: {slope:.2f} ± {entry['standard_error']:.3f}"
        axes.plot(ends, [math.exp(y0 + slope * (math.log(step) - x0)) for step in ends], color=colour, linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="steps T", ylabel="suboptimality of the averaged iterate")
    axes.set_title(f"{problem}: slope against T, rank {record['settings']['slope_rank']} of {record['settings']['width']}")
    _add_legend(axes)


def _draw_ranks(axes: Axes, record: dict[str, Any], problem: str) -> None:
    floors = [f for f in record["summary"]["floors"] if f["problem"] == problem and f["experiment"] == "floor"]
    for variant in dict.fromkeys(floor["variant"] for floor in floors):
        mine = [f for f in floors if f["variant"] == variant and _finite(f["median"])]
        colour = _COLOURS[variant]
        if mine and mine[0]["rank"] is None:
            axes.axhline(mine[0]["median"], color=colour, linestyle=":", label=variant)
            continue
        ranks, medians = [f["rank"] for f in mine], [f["median"] for f in mine]
        axes.plot(ranks, medians, color=colour, marker="o", markersize=4, label=variant)
        finite = [f for f in mine if _finite(f["max"])]
        axes.fill_between([f["rank"] for f in finite], [f["min"] for f in finite], [f["max"] for f in finite],
                          color=colour, alpha=0.2)  # fmt: skip
    axes.set(yscale="log", xlabel="rank", ylabel="suboptimality of the averaged iterate")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := record["settings"]["floor_ranks"], [str(rank) for rank in ticks])
    axes.set_title(f"{problem}: floor against rank, T = {record['settings']['floor_steps']}")
    _add_legend(axes)


def _add_legend(axes: Axes) -> None:
    """Below the curves, where room is made for it."""
    low, high = axes.get_ylim()
    axes.set_ylim(low / (high / low) ** 0.45, high)
    axes.legend(fontsize=8, loc="lower left")


def _draw_memories(axes: Axes, record: dict[str, Any], problem: str) -> None:
    floors = [f for f in record["summary"]["floors"] if f["problem"] == problem and f["experiment"] == "memory"]
    for place, floor in enumerate(floors):
        value = floor["median"]
        colour = "C1" if floor["variant"].startswith("no feedback") else "C0"
        if not _finite(value):
            axes.text(axes.get_xlim()[0], place, " diverged", va="center", fontsize=8)
            continue
        axes.barh(place, value, color=colour)
        axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(floors)), [floor["variant"] for floor in floors], fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("suboptimality of the averaged iterate")
    axes.set_title(f"{problem}: by memory, rank {record['settings']['memory_rank']}, T = {record['settings']['floor_steps']}")
