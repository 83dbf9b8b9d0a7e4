"""Tables on a terminal, and where the output is no terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from gradlite.compare.tables import NONE, REMARK, Table

_ANY_WIDTH = 100_000

_REMARK_WIDTH = 20
"""Remarks quote paths and errors: they may break anywhere, where they have at least this."""


def print_table(console: Console, table: RichTable) -> None:
    """Print a table within a terminal's width; in a pipe or a file, which have no width, at the table's own."""
    width = console.width
    if not console.is_terminal:
        console.width = max(width, Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum)
    try:
        console.print(table)
    finally:
        console.width = width


def to_rich(table: Table, width: int | None = None) -> RichTable:
    """A table as wide as it is, or of at most ``width`` characters; where words would break in those, a list of its cells."""
    widths: Sequence[int | None] | None = [None] * len(table.columns) if width is None else _widths(table, width)
    if widths is None:
        return _list(table)
    shown = _titled(table)
    for number, column in enumerate(table.columns):
        is_text = number == 0 or column == REMARK
        shown.add_column(Text(column), justify="left" if is_text else "right", overflow="fold", width=widths[number])
    for row in table.rows:
        shown.add_row(*map(Text, row))  # not as rich's markup: errors quote file names in brackets
    return shown


def _list(table: Table) -> RichTable:
    """Under the name of each row its cells, a line each, empty ones left out."""
    shown = _titled(table)
    shown.show_header = False
    shown.add_column(overflow="fold")
    shown.add_column(overflow="fold")
    for name, *cells in table.rows:
        shown.add_section()
        shown.add_row(Text(name, style="bold"), "")
        for column, cell in zip(table.columns[1:], cells, strict=True):
            if cell not in ("", NONE):
                shown.add_row(Text(column), Text(cell))
    return shown


def _widths(table: Table, width: int) -> list[int] | None:
    """Characters of each column, by words first and then for what needs most; None where not all words have room.

    (rich narrows the widest columns only, in the middle of words.)
    """
    texts = [(column, *(row[number] for row in table.rows)) for number, column in enumerate(table.columns)]
    wanted = [max(map(len, column)) for column in texts]
    widths = [
        min(_REMARK_WIDTH, wish) if column[0] == REMARK else max(len(word) for text in column for word in text.split())
        for column, wish in zip(texts, wanted, strict=True)
    ]
    spare = width - sum(widths) - 3 * len(widths) - 1  # a border and two blanks each
    if spare < 0:
        return None
    for _ in range(min(spare, sum(wanted) - sum(widths))):
        neediest = max(range(len(widths)), key=lambda number: wanted[number] - widths[number])
        widths[neediest] += 1
    return widths


def _titled(table: Table) -> RichTable:
    return RichTable(title=Text(table.title), caption=Text("\n".join(table.notes)) if table.notes else None)
