"""`gradlite report`: records, or a run's directory → one HTML page."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORDS_OR_RUN", help="A run's directory; or records: .json or .jsonl files, or directories of them."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Where the page goes. (default: report.html in the directory given)", show_default=False
        ),
    ] = None,
) -> None:
    """Turn the records of a comparison, or one training run, into one HTML page that needs nothing else.

    The page holds a summary, tables, and figures of memory, losses, speed and the gradient's energy inside the bases.
    """
    from gradlite.report.page import write_report  # brings matplotlib, which --help must not wait for

    path, sentences = write_report(paths, output)
    for sentence in sentences:
        typer.echo(sentence)
    typer.echo(f"the page is in {path}")
