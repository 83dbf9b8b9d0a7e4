"""The sections of a page of records: one for each experiment."""

import math
from collections.abc import Sequence

from gradlite.compare.record import Record
from gradlite.report.charts import Bar, Line, Point, heat_map, lines, memory_bars, scatter
from gradlite.report.energy import mean_line
from gradlite.report.palette import CATEGORIES, Look, look
from gradlite.report.provenance import of_records
from gradlite.report.rows import Group, Row
from gradlite.report.section import Picture, Section, area_keys, line_key
from gradlite.report.sentences import of_group
from gradlite.report.tables import experiment_tables, folded_tables, table_number
from gradlite.report.words import in_loss, in_memory
from gradlite.train.words import running_mean

_SMOOTHED = 10
_CURVES_FROM = 20
"""Steps: shorter runs measure memory and speed, and their losses say nothing."""


def sections(groups: Sequence[Group]) -> list[Section]:
    """Every experiment's sentences, table, and those figures for which it has numbers; the numbered tables first."""
    ordered = sorted(groups, key=lambda group: table_number(group) or math.inf)
    return [_section(group, f"e{number}") for number, group in enumerate(ordered)]


def _section(group: Group, prefix: str) -> Section:
    looks = {row.name: look(number) for number, row in enumerate(group.rows)}
    by_look = [*_losses(group, looks, prefix), *_trade(group, looks, prefix), *_energy(group, looks, prefix)]
    legend = [line_key(row.name, looks[row.name]) for row in group.rows if row.best and by_look]
    pictures = [*_memory(group, prefix), *by_look]
    return Section(group.experiment, of_group(group), experiment_tables(group), legend, pictures, folded_tables(group))


def _memory(group: Group, prefix: str) -> list[Picture]:
    shown = [row.shown for row in group.rows if row.shown is not None and row.shown.memory is not None]
    bars = [_bar(record) for record in shown]
    if not bars:
        return []
    told = "; ".join(f"{bar.name} {in_memory(bar.total_bytes)}" for bar in bars)
    svg = memory_bars(f"{prefix}-memory", bars, f"Bars of peak memory by category. {told}.")
    caption = "Live memory at the moment of the step's peak, by what it is for; one run each."
    if not all(bar.by_category_bytes for bar in bars):
        caption += " Without a colour: only the sum was measured."
    return [Picture(svg, "Peak memory", caption, of_records(shown), area_keys())]


def _bar(record: Record) -> Bar:
    assert record.memory is not None
    parts = record.memory.by_category_bytes
    values = None if parts is None else [float(getattr(parts, category)) for category in CATEGORIES]
    return Bar(record.name, record.memory.peak_bytes, values)


def _losses(group: Group, looks: dict[str, Look], prefix: str) -> list[Picture]:
    """Training and held-out loss, against steps and against seconds: a row's finished runs at its best rate, as their mean."""
    pictures = []
    for kind, curve in (("training", _training_curve), ("held-out", _held_out_curve)):
        for against in ("steps", "seconds"):
            found = [(row, curve(row, looks[row.name], against)) for row in group.rows if row.best]
            drawn = [(row, line) for row, line in found if line is not None]
            if not drawn:
                continue
            axis = "step" if against == "steps" else "seconds of training"
            told = "; ".join(f"{row.name} {in_loss(line.y[-1])}" for row, line in drawn)
            description = f"Curves of {kind} loss against {against}. They end at: {told}."
            svg = lines(
                f"{prefix}-{kind}-{against}", [line for _, line in drawn], axis, f"{kind} loss (nats per token)", description
            )
            how = f"Running means of {_SMOOTHED} steps" if kind == "training" else "Where it was evaluated"
            caption = f"{how}; each method at its best learning rate, the mean of its seeds."
            origin = of_records([record for row, _ in drawn for record in row.best])
            pictures.append(Picture(svg, f"{kind.capitalize()} loss against {against}", caption, origin))
    return pictures


def _training_curve(row: Row, its_look: Look, against: str) -> Line | None:
    runs = [record.curve for record in row.best if len(record.curve.step) >= _CURVES_FROM]
    by_step = list(zip(*(zip(run.step, run.seconds, run.train_loss, strict=True) for run in runs), strict=False))
    places = [
        (
            step if against == "steps" else _mean([seconds for _, seconds, _ in point]),
            [loss for *_, loss in point if loss is not None],
        )
        for point in by_step
        for step in [point[0][0]]
    ]
    known = [(float(x), _mean(losses)) for x, losses in places if losses]
    if not known:
        return None
    return Line([x for x, _ in known], running_mean([loss for _, loss in known], _SMOOTHED), its_look, _tip(row))


def _held_out_curve(row: Row, its_look: Look, against: str) -> Line | None:
    points = [point for record in row.best for point in record.held_out if point.loss is not None]
    steps = sorted({point.step for point in points})
    if not steps:
        return None
    at = {step: [point for point in points if point.step == step] for step in steps}
    x = [float(step) if against == "steps" else _mean([point.seconds for point in at[step]]) for step in steps]
    return Line(
        x,
        [_mean([point.loss for point in at[step] if point.loss is not None]) for step in steps],
        its_look,
        _tip(row),
        marked=True,
    )


def _tip(row: Row) -> str:
    seeds = ", ".join(str(record.seed) for record in sorted(row.best, key=lambda record: record.seed))
    return f"{row.name}, learning rate {row.best[0].lr:g}, seeds {seeds}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _trade(group: Group, looks: dict[str, Look], prefix: str) -> list[Picture]:
    rows = [row for row in group.rows if row.loss and row.peak_bytes]
    if not rows:
        return []
    points = [_point(row, looks[row.name]) for row in rows]
    told = "; ".join(f"{point.name} {in_memory(point.peak_bytes)}, loss {point.loss:.4f}" for point in points)
    svg = scatter(f"{prefix}-trade", points, f"Peak memory against held-out loss. {told}.")
    size = " A larger marker is faster." if any(point.tokens_per_second for point in points) else ""
    caption = f"Lower left is better: less memory, lower loss.{size} Loss: mean over seeds; memory and speed: of equal batches."
    return [Picture(svg, "Memory, quality and speed", caption, of_records([record for row in rows for record in row.best]))]


def _point(row: Row, its_look: Look) -> Point:
    assert row.loss is not None
    assert row.peak_bytes is not None
    return Point(row.name, row.peak_bytes, row.loss.mean, row.tokens_per_second, its_look)


def _energy(group: Group, looks: dict[str, Look], prefix: str) -> list[Picture]:
    shown = [(row, row.shown) for row in group.rows if row.shown is not None and row.shown.energy and row.shown.energy.steps]
    if not shown:
        return []
    curves, told = [], []
    for row, record in shown:
        assert record.energy is not None
        steps, shares = mean_line(record.energy)
        if shares:
            curves.append(
                Line(steps, shares, looks[row.name], f"{row.name}, seed {record.seed}", marked=len(steps) < _CURVES_FROM)
            )
            told.append(f"{row.name} {100 * shares[-1]:.1f} % at the end")
    svg = lines(f"{prefix}-energy", curves, "step", "share inside the basis", f"Mean shares: {'; '.join(told)}.")
    caption = "Share of the gradient's energy inside the basis, the mean over layers."
    pictures = [Picture(svg, "The gradient's energy inside the basis", caption, of_records([record for _, record in shown]))]
    for number, (row, record) in enumerate(shown):
        assert record.energy is not None
        found = record.energy
        svg = heat_map(
            f"{prefix}-heat{number}", found.layers, found.steps, found.inside, f"Shares of {row.name} by layer and step."
        )
        pictures.append(Picture(svg, f"Energy inside the basis: {row.name}", "By layer and step.", of_records([record])))
    return pictures
