"""matplotlib figures as inline SVG that belongs to its page: its colours, its fonts, its themes, tooltips, unique ids."""

import io
import re
import unicodedata
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gradlite.report.palette import GRID, INK, LINK, MUTED, PAGE, SERIES

WIDTH = 400
"""Pixels at full size: narrow enough for a telephone; wide screens put several figures side by side."""

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_VARIABLES = {colour.light: f"var(--{colour.name})" for colour in (PAGE, INK, MUTED, GRID, LINK, *SERIES)}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gradlite",
    "font.size": 11,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "text.color": INK.light,
    "axes.edgecolor": MUTED.light,
    "axes.labelcolor": INK.light,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "grid.color": GRID.light,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "xtick.labelcolor": INK.light,
    "ytick.labelcolor": INK.light,
    "lines.linewidth": 1.6,
}


def legible(text: str) -> str:
    """On one line, and without characters that XML cannot hold: control characters and halves of surrogate pairs become `�`."""
    return "".join("�" if unicodedata.category(letter) in ("Cc", "Cs", "Cn") else letter for letter in " ".join(text.split()))


def new_figure(height: float) -> Figure:
    """An empty figure, ``WIDTH`` × ``height`` pixels; make it, draw in it and turn it into SVG under :data:`STYLE`."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def inline_svg(figure: Figure, prefix: str, description: str, tooltips: Mapping[str, str] | None = None) -> Markup:
    """The figure as an `<svg>` element that needs nothing from outside.

    Args:
        prefix: unique on the page; every id begins with it.
        description: what the figure shows, for those who cannot see it.
        tooltips: by an artist's gid, what a pointer resting on it is told.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's browser has the fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        gid = element.get("id")
        if tooltips and gid is not None and gid in tooltips:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = legible(tooltips[gid])
            element.insert(0, title)
        for key, value in element.attrib.items():
            element.set(key, _adapted(key, value, prefix))
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", legible(description))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # every text was escaped by ElementTree


def _adapted(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == f"{{{_XLINK}}}href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), value)


def style() -> AbstractContextManager[None]:
    """The context in which figures are made, drawn in and turned into SVG."""
    context: AbstractContextManager[None] = mpl.rc_context(STYLE)
    return context
