"""Colours by what they stand for. A figure is drawn in the light ones; the page swaps each for a CSS variable.

Every series colour has a contrast of at least 3 : 1 with the page, in the light and in the dark theme (a test computes it),
and lines differ by dashes and markers as well, so that no figure needs colour to be read.
"""

from typing import NamedTuple


class Colour(NamedTuple):
    """A CSS variable, and its values in both themes."""

    name: str
    light: str
    dark: str


PAGE = Colour("page", "#fffffe", "#14171b")
INK = Colour("ink", "#1b1f24", "#e8eaed")
MUTED = Colour("muted", "#545c66", "#a9b1bb")
GRID = Colour("grid", "#dcdfe4", "#343a42")
LINK = Colour("link", "#0a58a6", "#7fbcf5")

SERIES = (
    Colour("series-1", "#0b62ad", "#62aef0"),
    Colour("series-2", "#c34a05", "#ff9757"),
    Colour("series-3", "#0a7a5c", "#45c9a0"),
    Colour("series-4", "#8b3fa0", "#d49be6"),
    Colour("series-5", "#846300", "#e3bd3e"),
    Colour("series-6", "#b2214f", "#ff8aa8"),
    Colour("series-7", "#5a6472", "#b3bcc9"),
    Colour("series-8", "#3f7f00", "#9ed65a"),
)

CATEGORIES = ("weights", "gradients", "optimizer_state", "held_activations", "temporaries")
CATEGORY_COLOURS = (SERIES[6], SERIES[4], SERIES[0], SERIES[1], SERIES[2])

DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class Look(NamedTuple):
    """How one series is drawn."""

    colour: Colour
    dash: tuple[float, ...]
    marker: str


def look(index: int) -> Look:
    """The look of the n-th series: eight colours first, then the same colours dashed."""
    turn = index // len(SERIES)
    return Look(SERIES[index % len(SERIES)], DASHES[turn % len(DASHES)], MARKERS[(index + turn) % len(MARKERS)])


def variables(dark: bool) -> str:
    """The declarations of all colours for one theme."""
    colours = (PAGE, INK, MUTED, GRID, LINK, *SERIES)
    return " ".join(f"--{colour.name}: {colour.dark if dark else colour.light};" for colour in colours)
