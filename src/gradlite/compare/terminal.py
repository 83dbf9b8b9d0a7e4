"""Tables on a terminal, and where the output is no terminal."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_ANY_WIDTH = 100_000


def print_table(console: Console, table: Table) -> None:
    """Print a table within a terminal's width; in a pipe or a file, which have no width, at the table's own."""
    width = console.width
    if not console.is_terminal:
        console.width = max(width, Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum)
    try:
        console.print(table)
    finally:
        console.width = width
