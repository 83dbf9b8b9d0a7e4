"""Out of memory, wherever it is met, is one sentence with remedies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradlite.errors import GradLiteError
from gradlite.train.out_of_memory import out_of_memory_told
from gradlite.train.trainer import GradLiteTrainer

Train = Callable[..., Any]  # the fixture's function: settings → what the run left


def test_running_out_of_memory_is_told_with_remedies_and_leaves_no_half_written_files(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = GradLiteTrainer.compute_loss

    def hungry(self: GradLiteTrainer, *args: Any, **keywords: Any) -> Any:
        if self.state.global_step == 4:
            torch.empty(2**60, dtype=torch.uint8)
        return original(self, *args, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(GradLiteTrainer, "compute_loss", hungry)
        with pytest.raises(GradLiteError, match=r"needs more memory .* --batch-size .* --accumulation .* --seq-len, .* --rank"):
            train(save_every=3)
    folder = tmp_path / "runs" / "run"
    assert {path.name for path in folder.iterdir()} == {"run.json", "config.yaml", "metrics.jsonl", "checkpoints"}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    train(save_every=3, resume=True)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_every_way_to_run_out_of_memory(error: Exception) -> None:
    with pytest.raises(GradLiteError, match="more memory"), out_of_memory_told():
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_told():
        raise RuntimeError("shapes do not fit")
