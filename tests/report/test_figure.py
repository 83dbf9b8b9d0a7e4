"""Figures as SVG that belongs to its page, and colours that can be told from it."""

import math
import re
from xml.etree import ElementTree

import pytest

from gradlite.report.charts import Bar, Line, Point, heat_map, lines, memory_bars, scatter
from gradlite.report.palette import INK, LINK, MUTED, PAGE, SERIES, look
from gradlite.train.words import running_mean


def drawings(name: str) -> dict[str, str]:
    """One of each, with the name given."""
    return {
        "lines": lines("p", [Line([1, 2, 3], [3, 2, 1], look(0), name)], "step", "loss", name),
        "dashed": lines("p", [Line([1], [3], look(9), name)], "seconds", "loss", name, from_zero=True),
        "bars": memory_bars("p", [Bar(name, 15e6, [1e6, 2e6, 3e6, 4e6, 5e6]), Bar(name, 9e6, None)], name),
        "scatter": scatter("p", [Point(name, 1e9, 1.0, 200.0, look(0)), Point(name, 2e9, 2.0, None, look(1))], name),
        "heat": heat_map("p", [name, "layer 1"], [10, 20], [[0.5, None], [0.7, 1.0]], name),
    }


HOSTILE = "<script>alert(1)</script> \"'& $\\frac{$ ]]> \x00\x1b\ud800 汉字 #0b62ad"


@pytest.mark.parametrize("name", ["AdamW", HOSTILE, ""], ids=["plain", "hostile", "empty"])
def test_drawings_are_whole_and_name_what_they_show(name: str) -> None:
    for kind, text in drawings(name).items():
        root = ElementTree.fromstring(text)
        assert "script" not in {element.tag.split("}")[-1] for element in root.iter()}, kind
        assert root.get("role") == "img"
        assert root.get("viewBox")
        assert root.get("width") is None  # as wide as its place
        if name == "AdamW":
            assert root.get("aria-label") == name
            if kind != "heat":
                assert any(element.tag.endswith("title") and "AdamW" in (element.text or "") for element in root.iter())


def test_drawings_take_their_colours_from_the_page() -> None:
    for kind, text in drawings("AdamW").items():
        fixed = set(re.findall(r"#[0-9a-f]{6}\b", text))
        assert fixed <= {"#ffffff", "#000000"}, kind
        assert "var(--ink)" in text
        assert "var(--grid)" in text or kind == "heat"


def test_ids_carry_their_prefix_and_are_found() -> None:
    for text in drawings("AdamW").values():
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert ids
        assert all(one.startswith("p-") for one in ids)
        used = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
        assert set(used) <= set(ids)


def test_the_same_numbers_give_the_same_drawing() -> None:
    assert drawings("a") == drawings("a")


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_with_the_page() -> None:
    for colour in (INK, MUTED, LINK):
        assert contrast(colour.light, PAGE.light) >= 4.5
        assert contrast(colour.dark, PAGE.dark) >= 4.5
    for colour in SERIES:
        assert contrast(colour.light, PAGE.light) >= 3, colour
        assert contrast(colour.dark, PAGE.dark) >= 3, colour


def test_thirty_series_look_different() -> None:
    looks = [look(number) for number in range(30)]
    assert len({(one.colour, one.dash) for one in looks}) == 30


def test_running_mean() -> None:
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert running_mean([], 2) == []
    assert math.isclose(running_mean([1.0] * 5, 20)[-1], 1.0)
