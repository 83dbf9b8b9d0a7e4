"""`gradlite report` itself."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradlite.cli.app import main
from gradlite.compare.record import Record

Gradlite = Callable[..., int]


@pytest.fixture
def gradlite(monkeypatch: pytest.MonkeyPatch) -> Gradlite:
    """Runs the command line; gives its exit code."""

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["gradlite", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


def test_the_page_and_its_sentences(
    record: Callable[..., Record], write_records: Any, tmp_path: Path, gradlite: Gradlite, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_records(record(curve={}))
    assert gradlite("report", folder, "--output", tmp_path / "out.html") == 0
    assert "Lowest held-out loss: AdamW with 1.0000" in capsys.readouterr().out
    assert (tmp_path / "out.html").read_text().startswith("<!DOCTYPE html>")


def test_bad_input_is_one_sentence(tmp_path: Path, gradlite: Gradlite, capsys: pytest.CaptureFixture[str]) -> None:
    assert gradlite("report", tmp_path / "nowhere") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no ")
    assert said.count("\n") == 1
