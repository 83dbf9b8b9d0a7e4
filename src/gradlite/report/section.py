"""The parts of a page, still as data: texts, tables, drawn figures. The template makes HTML of them and escapes every text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from gradlite.report.palette import CATEGORIES, CATEGORY_COLOURS, Look
from gradlite.report.provenance import Origin
from gradlite.report.tables import Table


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a sample of the line, the marker or the area, and its name."""

    name: str
    sample: Markup


@dataclass(frozen=True)
class Picture:
    """A drawn figure. ``caption`` says what is shown; ``origin`` how it was made."""

    svg: Markup
    title: str
    caption: str
    origin: Origin
    legend: Sequence[Key] = ()


@dataclass(frozen=True)
class Section:
    """One experiment, or one part of a run."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    legend: Sequence[Key] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[Table] = field(default=())


def line_key(name: str, look: Look, *, marked: bool = True) -> Key:
    """A short piece of a series' line, with its marker."""
    colour = f"var(--{look.colour.name})"
    dash = f' stroke-dasharray="{" ".join(f"{1.6 * length:g}" for length in look.dash)}"' if look.dash else ""
    line = f'<path d="M1 7H29" stroke="{colour}" stroke-width="2.4"{dash}/>'
    return Key(name, _sample(line + (f'<path d="{_MARKERS[look.marker]}" fill="{colour}"/>' if marked else "")))


def area_keys() -> list[Key]:
    """The categories of memory."""
    return [
        Key(name.replace("_", " "), _sample(f'<rect x="6" y="1" width="18" height="12" fill="var(--{colour.name})"/>'))
        for name, colour in zip(CATEGORIES, CATEGORY_COLOURS, strict=True)
    ]


def _sample(drawing: str) -> Markup:
    return Markup(f'<svg class="sample" viewBox="0 0 30 14" fill="none" aria-hidden="true">{drawing}</svg>')


# Around (15, 7), as matplotlib's markers of these names look.
_MARKERS = {
    "o": "M15 3a4 4 0 1 0 .01 0z",
    "s": "M11.5 3.5h7v7h-7z",
    "^": "M15 2.5l4.5 8h-9z",
    "v": "M15 11.5l4.5-8h-9z",
    "D": "M15 2l5 5l-5 5l-5-5z",
    "P": "M13.3 2.5h3.4v2.8h2.8v3.4h-2.8v2.8h-3.4v-2.8h-2.8v-3.4h2.8z",
    "X": "M11 5l2-2l2 2l2-2l2 2l-2 2l2 2l-2 2l-2-2l-2 2l-2-2l2-2z",
    "*": "M15 1.5l1.6 3.9l4.2.3l-3.2 2.7l1 4.1l-3.6-2.2l-3.6 2.2l1-4.1l-3.2-2.7l4.2-.3z",
}
