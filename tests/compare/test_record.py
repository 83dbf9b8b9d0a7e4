"""A record survives its file, and a broken file is told in one sentence that names it."""

import json
from pathlib import Path

import pytest

from gradlite.compare.record import Curve, Energy, HeldOut, Memory, Record, read_record, write_record
from gradlite.errors import GradLiteError


def record(run: str = "a", **changes: object) -> Record:
    keys: dict[str, object] = {
        "experiment": "e",
        "run": run,
        "method": "adamw",
        "model": "m",
        "dataset": "d",
        "dtype": "float32",
        "lr": 1e-4,
        "seed": 0,
        "batch_size": 2,
        "seq_len": 8,
        "steps": 3,
        "schedule": "cosine",
        "warmup_steps": 1,
        "status": "ok",
    }
    return Record.model_validate({**keys, **changes})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    whole = record(
        curve=Curve(step=[1, 2], train_loss=[1.5, None], seconds=[0.1, 0.2]),
        held_out=[HeldOut(step=0, loss=2.0, seconds=0.0), HeldOut(step=3, loss=1.25, seconds=0.3)],
        memory=Memory(peak_bytes=10, peak_above_weights_bytes=4),
        energy=Energy(steps=[1], layers=["x", "y"], inside=[[0.5, None]]),
        options={"rank": 8},
    )
    path = write_record(tmp_path / "new", whole)
    assert path == tmp_path / "new" / "a.json"
    assert read_record(path) == whole
    assert whole.final_held_out_loss == 1.25
    assert [path.name for path in path.parent.iterdir()] == ["a.json"]  # nothing half-written beside it


def test_the_final_loss_is_that_of_the_last_step_alone() -> None:
    assert record(held_out=[HeldOut(step=0, loss=2.0, seconds=0.0)]).final_held_out_loss is None


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    path = write_record(tmp_path, record(held_out=[HeldOut(step=3, loss=float("nan"), seconds=1.0)]))
    assert read_record(path).held_out[0].loss is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no whole record"),
        ("[]", "is no whole record"),
        (b"\xff", "is not UTF-8 text"),
        (
            json.dumps({**record().model_dump(mode="json"), "status": "fine"}),
            "its key 'status' is 'fine', but it should be 'ok'",
        ),
        (
            json.dumps({**record().model_dump(mode="json"), "record_version": 2}),
            "its key 'record_version' is 2, but it should be 1",
        ),
        (json.dumps({**record().model_dump(mode="json"), "curve": {"step": [1]}}), "differ in length"),
        (
            json.dumps({**record().model_dump(mode="json"), "energy": {"steps": [1], "layers": ["x"], "inside": [[]]}}),
            "one row a step",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GradLiteError, match=sentence) as told:
        read_record(path)
    assert "broken.json" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_record_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(GradLiteError, match=r"cannot be read: No such file"):
        read_record(tmp_path / "x.json")
