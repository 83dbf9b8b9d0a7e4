"""The sections of a page of records: one for each experiment."""

import math
from collections.abc import Sequence

from gradlite.compare.record import Record
from gradlite.report.charts import Bar, Line, Point, heat_map, lines, memory_bars, running_mean, scatter
from gradlite.report.energy import mean_line
from gradlite.report.palette import CATEGORIES, Look, look
from gradlite.report.provenance import of_records
from gradlite.report.rows import Group, Row
from gradlite.report.section import Key, Picture, Section, area_keys, line_key
from gradlite.report.sentences import of_group
from gradlite.report.tables import Table, general_table, memory_table, quality_table, runs_table
from gradlite.report.words import in_loss, in_memory

_TABLES = {"memory": ("Table 1", memory_table), "quality": ("Table 2", quality_table), "ablation": ("Table 3", quality_table)}
_SMOOTHED = 10
_CURVES_FROM = 20
"""Steps: shorter runs measure memory and speed, and their losses say nothing."""


def sections(groups: Sequence[Group]) -> list[Section]:
    """Every experiment's sentences, table, and those figures for which it has numbers."""
    return [_section(group, f"e{number}") for number, group in enumerate(groups)]


def _section(group: Group, prefix: str) -> Section:
    looks = {row.name: look(number) for number, row in enumerate(group.rows)}
    pictures = [
        *_memory(group, prefix),
        *_losses(group, looks, prefix),
        *_trade(group, looks, prefix),
        *_energy(group, looks, prefix),
    ]
    legend: list[Key] = [line_key(row.name, looks[row.name]) for row in group.rows if row.best]
    return Section(
        group.experiment, of_group(group), [_table(group)], legend if pictures else [], pictures, [runs_table(group.records)]
    )


def _table(group: Group) -> Table:
    """Tables 1, 2 and 3 of the presets are known by their experiments' names."""
    number, table = _TABLES.get(group.experiment.rsplit("-", 1)[-1], ("", general_table))
    return table(group, f"{number}: {group.experiment}" if number else group.experiment)


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
    """Training and held-out loss, against steps and against seconds, of every finished run at its row's best rate."""
    runs = [(row, record) for row in group.rows for record in sorted(row.best, key=lambda record: record.seed)]
    trained = [(row, record) for row, record in runs if len(record.curve.step) >= _CURVES_FROM]
    judged = [(row, record) for row, record in runs if record.held_out]
    pictures = []
    for kind, chosen in (("training", trained), ("held-out", judged)):
        if not chosen:
            continue
        for against in ("steps", "seconds"):
            curves = [_curve(row, record, looks[row.name], kind, against) for row, record in chosen]
            axis = "step" if against == "steps" else "seconds of training"
            how = f"running means of {_SMOOTHED} steps" if kind == "training" else "where it was evaluated"
            description = f"Curves of {kind} loss against {against}. Last values: {_last_values(group, kind, chosen)}."
            svg = lines(f"{prefix}-{kind}-{against}", curves, axis, f"{kind} loss (nats per token)", description)
            caption = f"{how[0].upper()}{how[1:]}; each method at its best learning rate, one line a seed."
            origin = of_records([record for _, record in chosen])
            pictures.append(Picture(svg, f"{kind.capitalize()} loss against {against}", caption, origin))
    return pictures


def _curve(row: Row, record: Record, its_look: Look, kind: str, against: str) -> Line:
    tip = f"{row.name}, learning rate {record.lr:g}, seed {record.seed}"
    if kind == "held-out":
        x = [float(point.step if against == "steps" else point.seconds) for point in record.held_out]
        return Line(
            x, [math.nan if point.loss is None else point.loss for point in record.held_out], its_look, tip, marked=True
        )
    whole = record.curve
    places = [(s, t, loss) for s, t, loss in zip(whole.step, whole.seconds, whole.train_loss, strict=True) if loss is not None]
    x = [float(step if against == "steps" else seconds) for step, seconds, _ in places]
    return Line(x, running_mean([loss for _, _, loss in places], _SMOOTHED), its_look, tip)


def _last_values(group: Group, kind: str, chosen: Sequence[tuple[Row, Record]]) -> str:
    if kind == "held-out":
        return "; ".join(f"{row.name} {in_loss(row.loss.mean)}" for row in group.rows if row.loss)
    by_row = {row.name: [loss for loss in record.curve.train_loss[-_SMOOTHED:] if loss is not None] for row, record in chosen}
    return "; ".join(f"{name} {in_loss(sum(last) / len(last))}" for name, last in by_row.items() if last)


def _trade(group: Group, looks: dict[str, Look], prefix: str) -> list[Picture]:
    rows = [row for row in group.rows if row.loss and row.peak_bytes]
    if not rows:
        return []
    points = [_point(row, looks[row.name]) for row in rows]
    told = "; ".join(f"{point.name} {in_memory(point.peak_bytes)}, loss {point.loss:.4f}" for point in points)
    svg = scatter(f"{prefix}-trade", points, f"Peak memory against held-out loss. {told}.")
    size = " A larger marker is faster." if any(point.tokens_per_second for point in points) else ""
    caption = f"Lower left is better: less memory, lower loss.{size} Means over the seeds at the best learning rate."
    return [Picture(svg, "Memory, quality and speed", caption, of_records([record for row in rows for record in row.best]))]


def _point(row: Row, its_look: Look) -> Point:
    assert row.loss is not None
    assert row.peak_bytes is not None
    return Point(
        row.name, row.peak_bytes, row.loss.mean, row.tokens_per_second.mean if row.tokens_per_second else None, its_look
    )


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
