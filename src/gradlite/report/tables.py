"""Records as tables: those of `gradlite compare`, and one of all runs by themselves.

A comparison's first seed stands in no record: here it is the one that tried the most rates, and of several the lowest.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gradlite.compare import tables
from gradlite.compare.experiment import PRESETS, load_experiment
from gradlite.compare.record import Record
from gradlite.report.rows import Group
from gradlite.report.words import NOTHING, in_loss, in_memory

_NUMBERS = re.compile(r"[\d\s.,–+−×%-]*")
_SHIPPED = {name: number for names in PRESETS.values() for number, name in names.items()}


@dataclass(frozen=True)
class Table:
    """Texts, not markup. The first cell of each row is its header; ``numeric`` tells the columns that hold numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    note: str = ""


def table_number(group: Group) -> int | None:
    """Which of the paper's tables an experiment makes: 1, 2 or 3; None for experiments of the user's own."""
    return _SHIPPED.get(group.experiment)


def experiment_tables(group: Group) -> list[Table]:
    """The paper's table, if the experiment is one of the presets'; otherwise all tables for which there are numbers."""
    number = table_number(group)
    reference = group.reference
    baselines = [reference.name] if reference is not None else []
    title, kind = group.experiment, ""
    if number is not None:
        preset = load_experiment(group.experiment)
        baselines, title, kind = preset.baselines, f"Table {number}: {preset.title}", preset.kind
    records, found = group.records, []
    if kind == "memory" or (not kind and any(row.peak_bytes or row.tokens_per_second for row in group.rows)):
        found.append(tables.memory_table(records, title if kind else f"{title}: memory and throughput"))
        ratios = tables.ratio_table(records, f"{title}: ratios", baselines)
        found += [ratios] if len(ratios.columns) > 1 else []
    if kind in ("quality", "ablation") or (not kind and any(record.held_out for record in records)) or not found:
        found.append(tables.quality_table(records, title if kind else f"{title}: held-out loss", baselines))
    return [_shown(table) for table in found]


def folded_tables(group: Group) -> list[Table]:
    """What the bars of memory show, in numbers, and every run by itself."""
    by_category = _shown(tables.category_table(group.records, "Bytes at the moment of the peak"))
    return [*([by_category] if len(by_category.columns) > 1 else []), runs_table(group.records)]


def runs_table(records: Sequence[Record]) -> Table:
    """Every run by itself."""
    columns = ["Run", "Method", "Rate", "Seed", "Steps", "Held-out loss", "Peak memory", "Tokens/s", "Status", "Date"]
    rows = [
        [
            record.run,
            record.name,
            f"{record.lr:g}",
            str(record.seed),
            f"{len(record.curve.step)} of {record.steps}",
            in_loss(record.final_held_out_loss),
            in_memory(record.memory.peak_bytes if record.memory else None),
            NOTHING if record.tokens_per_second is None else f"{record.tokens_per_second.median:,.1f}",
            _status(record),
            record.date or NOTHING,
        ]
        for record in records
    ]
    notes = [f"{record.run}: {record.memory.note}" for record in records if record.memory and record.memory.note]
    numeric = [2 <= number <= 7 for number in range(len(columns))]
    return Table("All runs", columns, rows, numeric, "; ".join(notes))


def _shown(table: tables.Table) -> Table:
    """Without columns in which nobody has anything."""
    cells = list(zip(*table.rows, strict=True))
    kept = [number for number, column in enumerate(cells) if number == 0 or any(cell not in ("", NOTHING) for cell in column)]
    rows = [[row[number] for number in kept] for row in table.rows]
    numeric = [number > 0 and all(_NUMBERS.fullmatch(cell) for cell in cells[number]) for number in kept]
    return Table(table.title, [table.columns[number] for number in kept], rows, numeric, " ".join(table.notes))


def _status(record: Record) -> str:
    status = record.status.replace("_", " ")
    return f"{status}: {record.reason}" if record.reason else status
