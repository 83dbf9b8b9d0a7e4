"""Sections → one HTML file that needs nothing else: no script, no font, no style from outside."""

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gradlite.errors import GradLiteError
from gradlite.report import comparison, training
from gradlite.report.palette import variables
from gradlite.report.read import Records, TrainedRun, read
from gradlite.report.rows import group
from gradlite.report.section import Section
from gradlite.train.files import write_text

_FOLDER = files("gradlite.report")


def write_report(paths: Sequence[Path], output: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page of what lies at ``paths``; return its path and the sentences of its summaries.

    Without ``output`` it is report.html in the directory given, or beside the first file. Raises GradLiteError for bad input.
    """
    source = read(paths)
    target = output or (paths[0] if paths[0].is_dir() else paths[0].parent) / "report.html"
    if not target.absolute().parent.is_dir() or target.is_dir():
        raise GradLiteError(f"{target} cannot be written; give --output the name of a file in a directory that exists.")
    if target.suffix in (".json", ".jsonl") or (target.exists() and not target.is_file()):  # a record, or a device
        raise GradLiteError(f"{target} is no place for a page; give --output a name that ends in .html.")
    title, sections = _content(source)
    left_out = source.left_out if isinstance(source, Records) else []
    page = render(title, sections, left_out)
    try:
        write_text(target, page)
    except OSError as error:
        raise GradLiteError(f"{target} cannot be written ({error.strerror}); give another --output.") from None
    return target, [sentence for section in sections for sentence in section.sentences]


def render(title: str, sections: Sequence[Section], left_out: Sequence[str] = ()) -> str:
    """The page as text. Every text in it is escaped by the template's engine."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_FOLDER.joinpath("page.html").read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        sections=sections,
        left_out=left_out,
        style=Markup(_FOLDER.joinpath("style.css").read_text(encoding="utf-8")),  # our own file
        light=variables(dark=False),
        dark=variables(dark=True),
        version=version("gradlite-llm"),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # halves of surrogate pairs cannot be written


def _content(source: Records | TrainedRun) -> tuple[str, list[Section]]:
    if isinstance(source, TrainedRun):
        return f"Training run {source.name}", training.sections(source)
    groups = group(source.records)
    return "Comparison of methods", comparison.sections(groups)
