"""What the theorem's points say: fitted slopes, floors by rank and by memory; as data, as Markdown, and for the terminal.

Suboptimality is a pure number here: the objective is a mean of squared errors or of nats.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from rich.table import Table

Row = list[str]
_Points = Sequence[dict[str, Any]]


def fit_slope(steps: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Slope of ``log(value)`` against ``log(steps)`` by least squares, and its standard error from the residuals.

    The error holds both the seeds' spread and the curve's bend. It is 0 for two points. Needs two different numbers of steps.
    """
    x, y = [math.log(step) for step in steps], [math.log(value) for value in values]
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(residual / (len(x) - 2) / spread) if len(x) > 2 else 0.0


def summarise(points: _Points) -> dict[str, Any]:
    """``slopes`` (one a problem, experiment and variant), ``floors`` (one a rank too) and ``ratios`` to feedback's floor.

    A floor is the median over seeds of the averaged iterate's suboptimality, with the lowest and highest seed; a run that
    diverged counts as infinite, and is null in a record.
    """
    slopes = []
    for (experiment, problem, variant), group in _grouped(points, "experiment", "problem", "variant"):
        if experiment not in ("slope", "control"):
            continue
        finite = [p for p in group if _value(p) < math.inf]
        lengths, values = [p["steps"] for p in finite], [p["suboptimality"] for p in finite]
        entry: dict[str, Any] = {"experiment": experiment, "problem": problem, "variant": variant, "runs": len(finite)}
        if len(set(lengths)) > 1:
            entry["slope"], entry["standard_error"] = fit_slope(lengths, values)
            longest = sorted(set(lengths))[-2:]
            tail = [(n, v) for n, v in zip(lengths, values, strict=True) if n in longest]
            entry["slope_of_the_two_longest"] = fit_slope(*zip(*tail, strict=True))[0]
            slopes.append(entry)
    floors = []
    for (experiment, problem, variant, rank), group in _grouped(points, "experiment", "problem", "variant", "rank"):
        if experiment in ("floor", "memory"):
            values = [_value(p) for p in group]
            halves = [_value(p, "second_half_suboptimality") for p in group]
            entry = {"experiment": experiment, "problem": problem, "variant": variant, "rank": rank, "runs": len(values)}
            spread = {"median": median(values), "min": min(values), "max": max(values), "second_half_median": median(halves)}
            floors.append(entry | spread)
    return {"slopes": slopes, "floors": floors, "ratios": _ratios(floors)}


def _ratios(floors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times lower the floor is with feedback (exact residual, full memory) than without, both with a tracked basis."""
    of = {(f["problem"], f["rank"], f["variant"]): f["median"] for f in floors if f["experiment"] == "floor"}
    return [
        {"problem": problem, "rank": rank, "times_lower": value / of[problem, rank, _WITH]}
        for (problem, rank, variant), value in of.items()
        if variant == _WITHOUT and (problem, rank, _WITH) in of
    ]


_WITHOUT, _WITH = "no feedback, tracked basis", "feedback, exact residual, full memory"


def tables(record: dict[str, Any]) -> list[tuple[str, Row, list[Row]]]:
    """Title, head and rows of each table."""
    summary = record["summary"]
    title = {"slope": "spectrum over four decades", "control": "one decade: strongly convex"}
    slopes = [
        [entry["problem"], title[entry["experiment"]], entry["variant"],
         f"{entry['slope']:.3f} ± {entry['standard_error']:.3f}", f"{entry['slope_of_the_two_longest']:.3f}"]
        for entry in summary["slopes"]
    ]  # fmt: skip
    result = [
        ("Slope of log suboptimality against log T",
         ["problem", "data", "algorithm", "slope ± standard error", "between the two largest T"], slopes)
    ]  # fmt: skip
    by_rank = [f for f in summary["floors"] if f["experiment"] == "floor"]
    ranks = sorted({f["rank"] for f in by_rank if f["rank"] is not None})
    floors: list[Row] = []
    for (problem, variant), group in _grouped(by_rank, "problem", "variant"):
        cells = {f["rank"]: _spread(f) for f in group}
        floors.append([problem, variant, *(cells.get(rank, cells.get(None, "")) for rank in ranks)])
    for (problem,), group in _grouped(summary["ratios"], "problem"):
        times = {entry["rank"]: _times(entry["times_lower"]) for entry in group}
        floors.append([problem, "tracked basis: without / with feedback", *(times.get(rank, "") for rank in ranks)])
    steps = record["settings"]["floor_steps"]
    result.append((f"Suboptimality after {steps} steps, by rank", ["problem", "algorithm", *map(str, ranks)], floors))
    by_memory = [f for f in summary["floors"] if f["experiment"] == "memory"]
    memories = [[f["problem"], f["variant"], _spread(f), _number(f["second_half_median"])] for f in by_memory]
    rank = record["settings"]["memory_rank"]
    head = ["problem", "algorithm", "all iterates averaged", "their second half averaged"]
    result.append((f"Suboptimality after {steps} steps at rank {rank}, by memory", head, memories))
    return result


def markdown_tables(record: dict[str, Any]) -> str:
    """The tables as a Markdown page."""
    seeds = len(record["settings"]["seeds"])
    parts = [
        "# The theorem by experiment",
        f"Median of {seeds} seeds (lowest to highest). `{record['command']}`, {record['date']}.",
    ]
    for title, head, rows in tables(record):
        lines = [head, ["---"] * len(head), *rows]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def rich_tables(record: dict[str, Any]) -> list[Table]:
    """The tables for a terminal."""
    made = []
    for title, head, rows in tables(record):
        table = Table(title=title, title_justify="left")
        for column in head:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def _grouped(entries: Iterable[dict[str, Any]], *keys: str) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return list(groups.items())


def _value(point: dict[str, Any], key: str = "suboptimality") -> float:
    value = point[key]
    return value if value is not None and math.isfinite(value) else math.inf


def _spread(floor: dict[str, Any]) -> str:
    if floor["runs"] == 1:
        return _number(floor["median"])
    return f"{_number(floor['median'])} ({_number(floor['min'])} to {_number(floor['max'])})"


def _number(value: float | None) -> str:
    return f"{value:.3g}" if value is not None and math.isfinite(value) else "diverged"


def _times(value: float | None) -> str:
    return f"{value:.3g}×" if value is not None and math.isfinite(value) else "–"
