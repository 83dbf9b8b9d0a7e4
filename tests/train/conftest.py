"""Small data files, and training runs of the tiny model that take a second."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gradlite.train.config import TrainConfig
from gradlite.train.run import run

Write = Callable[[str, Iterable[Mapping[str, Any]]], Path]
Train = Callable[..., "Outcome"]


class Outcome:
    """What a run left and what it showed."""

    def __init__(self, path: Path, shown: str) -> None:
        self.path = path
        self.shown = shown

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without those parts that are measurements of time and memory."""
        measured = {"tokens_per_second", "peak_memory_bytes", "seconds"}
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in measured} for line in lines]

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "run.json").read_text()))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_jsonl(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write_jsonl


@pytest.fixture
def train(tmp_path: Path, model_dir: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run a training with the given settings and return what it left; by default six steps on `sums`."""
    monkeypatch.setattr("gradlite.evaluate.answers.MAX_NEW_TOKENS", 4)

    def train_with(**settings: Any) -> Outcome:
        defaults = {
            "model": str(model_dir),
            "dataset": str(sums),
            "output_dir": str(tmp_path / "runs"),
            "name": "run",
            "dtype": "float32",
            "seq_len": 96,
            "max_steps": 6,
            "eval_examples": 6,
            "lr": 1e-3,
        }
        screen = io.StringIO()
        config = TrainConfig.from_sources(None, {**defaults, **settings})
        path = run(config, Console(file=screen, width=240))
        return Outcome(path, screen.getvalue())

    return train_with


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside the project, where there are any."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("there is no ../shared/data beside the project")
    return folder
