"""Records as tables. Every row that was run stands in its table; a failed one with its reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradlite.compare.record import Record
from gradlite.report.rows import Group, Range, Row
from gradlite.report.words import NOTHING, counted, in_loss, in_memory, in_percent, in_ratio, in_speed

_FAILED = {"failed": "failed", "out_of_memory": "out of memory"}


@dataclass(frozen=True)
class Table:
    """Texts, not markup. The first cell of each row is its header; ``numeric`` tells the columns that hold numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    note: str = ""


class _Column:
    def __init__(self, title: str, cell: Callable[[Row], str], *, numeric: bool = True) -> None:
        self.title, self.cell, self.numeric = title, cell, numeric


def memory_table(group: Group, caption: str) -> Table:
    """Peak memory and throughput."""
    return _table(
        group, caption, [*_memory(group), *_speed(group)], "Medians of the runs; in brackets the slowest and fastest step."
    )


def quality_table(group: Group, caption: str) -> Table:
    """Held-out loss, at the best learning rate over the seeds, and the sweep that chose it."""
    return _table(group, caption, _quality(group), _quality_note(group))


def general_table(group: Group, caption: str) -> Table:
    """All that is known of each method."""
    return _table(group, caption, [*_quality(group), *_memory(group), *_speed(group)], _quality_note(group))


def runs_table(records: Sequence[Record]) -> Table:
    """Every run by itself."""
    columns = ["run", "method", "learning rate", "seed", "steps", "held-out loss", "peak memory", "tokens/s", "status", "date"]
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
            failure(record) if record.status != "ok" else "ok",
            record.date or NOTHING,
        ]
        for record in records
    ]
    numeric = [False, False, True, True, True, True, True, True, False, False]
    return Table(
        "All runs",
        columns,
        rows,
        numeric,
        "Memory notes: " + "; ".join(_memory_notes(records)) if _memory_notes(records) else "",
    )


def failure(record: Record) -> str:
    """What became of a run that has no result: `out of memory: …`."""
    what = _FAILED[record.status]
    return f"{what}: {record.reason}" if record.reason else what


def _table(group: Group, caption: str, columns: Sequence[_Column], note: str) -> Table:
    """Columns that nobody has anything in are left out; failures get one of their own."""
    cells = [[column.cell(row) for row in group.rows] for column in columns]
    kept = [number for number, column in enumerate(cells) if any(cell != NOTHING for cell in column)]
    rows = [[row.name, *(cells[number][place] for number in kept)] for place, row in enumerate(group.rows)]
    titles = ["method", *(columns[number].title for number in kept)]
    numeric = [False, *(columns[number].numeric for number in kept)]
    if any(row.failures for row in group.rows):
        titles, numeric = [*titles, "without a result"], [*numeric, False]
        rows = [[*cells_of, _failures(row)] for cells_of, row in zip(rows, group.rows, strict=True)]
    return Table(caption, titles, rows, numeric, note)


def _memory(group: Group) -> list[_Column]:
    columns = [
        _Column("peak memory", lambda row: in_memory(row.peak_bytes)),
        _Column("above the weights", lambda row: in_memory(row.peak_above_weights_bytes)),
        _Column("process, above the weights", lambda row: in_memory(row.process_peak_bytes)),
    ]
    reference = group.reference
    if reference is not None and reference.peak_above_weights_bytes:
        base = reference.peak_above_weights_bytes
        title = f"above the weights, of {reference.name}'s"
        columns.append(_Column(title, lambda row: in_ratio(row.peak_above_weights_bytes, base)))
    return columns


def _speed(group: Group) -> list[_Column]:
    columns = [
        _Column("tokens/s", lambda row: in_speed(row.tokens_per_second)),
        _Column("samples/s", lambda row: in_speed(row.samples_per_second)),
    ]
    reference = group.reference
    if reference is not None and reference.tokens_per_second:
        base = reference.tokens_per_second.mean
        columns.append(_Column(f"tokens/s, of {reference.name}'s", lambda row: in_ratio(_mean(row.tokens_per_second), base)))
    return columns


def _quality(group: Group) -> list[_Column]:
    columns = [
        _Column("held-out loss", lambda row: in_loss(_mean(row.loss))),
        _Column("over the seeds", _over_seeds),
        _Column("seeds", lambda row: ", ".join(str(r.seed) for r in sorted(row.best, key=lambda r: r.seed)) or NOTHING),
        _Column("learning rate", lambda row: f"{row.best[0].lr:g}" if row.best else NOTHING),
        _Column("loss by learning rate", _sweep, numeric=False),
    ]
    reference = group.reference
    if reference is not None and reference.loss:
        base = reference.loss.mean
        columns.insert(
            2, _Column(f"against {reference.name}", lambda row: in_percent(row.loss.mean / base - 1) if row.loss else NOTHING)
        )
    return columns


def _quality_note(group: Group) -> str:
    steps = {record.steps for record in group.records}
    when = f" after {steps.pop()} steps" if len(steps) == 1 else ""
    return f"Nats per held-out token{when}: the mean over the seeds at the best learning rate, and its range."


def _over_seeds(row: Row) -> str:
    return NOTHING if row.loss is None or row.loss.count < 2 else f"{in_loss(row.loss.low)}–{in_loss(row.loss.high)}"


def _sweep(row: Row) -> str:
    if len(row.sweep) < 2:
        return NOTHING
    return "; ".join(f"{lr:g}: {in_loss(_mean(loss)) if loss else 'no result'}" for lr, loss in row.sweep)


def _failures(row: Row) -> str:
    if not row.failures:
        return NOTHING
    reasons = "; ".join(dict.fromkeys(failure(record) for record in row.failures))
    return f"{len(row.failures)} of {counted(len(row.runs), 'run')}: {reasons}"


def _memory_notes(records: Sequence[Record]) -> list[str]:
    return [f"{record.run}: {record.memory.note}" for record in records if record.memory and record.memory.note]


def _mean(found: Range | None) -> float | None:
    return None if found is None else found.mean
