"""A full disk is one sentence that says what is kept; one that is too small is refused before training."""

import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from gradlite.errors import GradLiteError
from gradlite.train import callback as callback_module
from gradlite.train.disk import check_room, failed_writes_told, more_checkpoints, saved_bytes
from gradlite.train.run import _Run

Train = Callable[..., Any]  # the fixture's function: settings → what the run left


@pytest.fixture
def fill_disk_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """After a step, no file can grow beyond so many bytes: the system's own errors, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = _Run._record_step

    def arrange(step: int, num_bytes: int) -> None:
        def record_then_fill(self: _Run, report: callback_module.StepReport) -> None:
            if report.step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
            original(self, report)

        monkeypatch.setattr(_Run, "_record_step", record_then_fill)

    yield arrange
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("save_every", "step", "num_bytes", "said"),
    [
        (2, 4, 100_000, r"checkpoints' could not .* \(.*too large.*\); '.*checkpoint-2' is kept: .*--resume"),  # safetensors
        (None, 5, 100_000, r"run' could not .* \(.*too large.*\); no checkpoint .* another --output-dir"),
        (None, 5, 100, r"run' could not .* \(File too large\); no checkpoint"),  # metrics.jsonl
    ],
)
def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    train: Train, fill_disk_at: Any, tmp_path: Path, save_every: int | None, step: int, num_bytes: int, said: str
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill_disk_at(step, num_bytes)
    try:
        with pytest.raises(GradLiteError, match=said) as error:
            train(save_every=save_every)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value)
    folder = tmp_path / "runs" / "run"
    assert not list(folder.rglob(".writing-*"))
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")],
)
def test_every_way_to_fail_at_writing(error: Exception) -> None:
    with pytest.raises(GradLiteError, match="could not be written to"), failed_writes_told(Path("run"), lambda: None):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), failed_writes_told(Path("run"), lambda: None):
        raise RuntimeError("shapes do not fit")


def test_a_disk_too_small_for_the_model_is_refused_before_anything_is_written(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=500_000)  # the model has 362 kB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        GradLiteError, match=r"500 kB free, but the model and 2 checkpoints take at least 1\.09 MB.*--save-every"
    ):
        train(save_every=2)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    with pytest.raises(GradLiteError, match=r"300 kB free, but the model takes at least 362 kB; .*another --output-dir\."):
        train()


def test_what_is_replaced_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=500)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_room(tmp_path / "new" / "run", 400, 1, freed_bytes=300)
    with pytest.raises(GradLiteError, match="799 bytes free"):
        check_room(tmp_path / "new" / "run", 400, 1, freed_bytes=299)


@pytest.mark.parametrize(
    ("steps", "done", "every", "num_there", "expected"),
    [(10, 0, None, 0, 0), (10, 0, 20, 0, 1), (10, 0, 2, 0, 2), (10, 4, 2, 2, 0), (10, 4, 4, 1, 1), (4, 4, 4, 1, 0)],
)
def test_checkpoints_to_come(steps: int, done: int, every: int | None, num_there: int, expected: int) -> None:
    assert more_checkpoints(steps, done, every, num_there, num_kept=2) == expected


def test_adapters_are_all_that_is_saved_of_a_wrapped_model() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.adapter = nn.Linear(8, 8), nn.Linear(8, 2, bias=False)
            self.base.requires_grad_(False)

        def get_base_model(self) -> nn.Module:
            return self.base

    assert saved_bytes(Wrapped()) == 8 * 2 * 4
    assert saved_bytes(Wrapped().base) == (8 * 8 + 8) * 4
