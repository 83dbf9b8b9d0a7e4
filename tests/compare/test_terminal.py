"""Tables on terminals of any width."""

import io

from rich.console import Console

from gradlite.compare.tables import NONE, REMARK, Table
from gradlite.compare.terminal import to_rich

WORDS = Table(
    "T",
    ("Method", "Peak above weights (GB)", "Seeds", REMARK),
    (
        ("AdamW + checkpointing", "1.826", "3", ""),
        ("8-bit AdamW", NONE, "0", "failed: /a/very/long/path/that/does/not/fit/anywhere"),
    ),
)


def shown(table: Table, width: int) -> str:
    screen = io.StringIO()
    Console(file=screen, width=width).print(to_rich(table, width))
    return screen.getvalue()


def test_brackets_are_no_markup() -> None:
    table = Table("T [a]", ("a [b]",), (("torch [enforce fail at alloc_cpu.cpp]",), ("[/nowhere]",)), ("[note]",))
    for width in (200, 38):
        text = shown(table, width)
        assert all(part in text for part in ("T [a]", "[enforce", "[/nowhere]", "[note]"))


def test_a_table_is_no_wider_than_it_needs_to_be() -> None:
    lines = shown(WORDS, 200).splitlines()
    assert any(all(cell in line for cell in ("AdamW + checkpointing", "1.826", "3")) for line in lines)
    assert max(map(len, lines)) < 200


def test_columns_narrow_down_between_words() -> None:
    lines = shown(WORDS, 61).splitlines()
    assert max(map(len, lines)) <= 61
    assert all(any(word in line for line in lines) for word in ("checkpointing", "weights", "Method", "Seeds", "1.826"))
    assert not any("Peak above weights (GB)" in line for line in lines)


def test_where_words_have_no_room_rows_are_lists() -> None:
    text = shown(WORDS, 52)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 52
    assert any("AdamW + checkpointing" in line and "1.826" not in line for line in lines)
    assert any("Peak above weights (GB)" in line and "1.826" in line for line in lines)
    assert text.count("Peak above") == 1  # the failed row has none
    assert text.count(REMARK) == 1  # the good row has none


def test_a_long_path_breaks_and_nothing_is_lost() -> None:
    for width in (30, 52, 61, 80):
        last = "".join(line.split("│")[-2].strip() for line in shown(WORDS, width).splitlines() if line.count("│") > 2)
        assert "/a/very/long/path/that/does/not/fit/anywhere" in last
