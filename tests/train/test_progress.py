"""The progress line, alive on a terminal and sparse elsewhere."""

import io
import math

import pytest
from rich.console import Console

from gradlite.train.callback import StepReport
from gradlite.train.progress import Progress
from gradlite.train.words import in_bytes, in_count, in_time


def report(step: int, loss: float = 1.25, skipped: int = 0) -> StepReport:
    return StepReport(
        step=step,
        num_steps=100,
        loss=loss,
        grad_norm=0.5,
        learning_rate=1e-4,
        num_tokens=10 * step,
        tokens_per_second=812.4,
        peak_memory_bytes=1_200_000_000,
        seconds_left=201.0,
        skipped_steps=skipped,
    )


def shown(terminal: bool, *reports: StepReport) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120)
    with Progress(console) as progress:
        for one in reports:
            progress.show(one)
        progress.show_evaluation(100, 0.75)
    return screen.getvalue()


def test_a_terminal_gets_a_live_line() -> None:
    text = shown(True, report(1), report(2))
    assert "\x1b[" in text  # it is moved over, not repeated
    for part in ("step 2/100", "loss 1.2500", "gradient 0.5", "812 tokens/s", "peak 1.2 GB", "left 3:21"):
        assert part in text
    assert "held-out loss 0.7500" in text


def test_elsewhere_a_line_every_so_often_and_for_every_skipped_step() -> None:
    reports = [report(step, math.nan if step == 7 else 1.0, skipped=int(step >= 7)) for step in range(1, 101)]
    lines = shown(False, *reports).splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines[:-1]] == [1, 5, 7, *range(10, 101, 5)]
    assert "skipped 1" in lines[2]
    assert "\x1b[" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (in_bytes(1_234_567_890), "1.23 GB"),
        (in_bytes(5_000), "5 kB"),
        (in_bytes(12), "12 bytes"),
        (in_bytes(999_700_000), "1 GB"),
        (in_bytes(999_400_000), "999 MB"),
        (in_bytes(1.08e12), "1.08 TB"),
        (in_time(59.6), "1:00"),
        (in_time(3723), "1:02:03"),
        (in_count(134_515_008), "134.5 M"),
        (in_count(950), "950"),
    ],
)
def test_numbers_in_words(text: str, expected: str) -> None:
    assert text == expected
