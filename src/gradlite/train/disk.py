"""A disk that is full, or will be: said in one sentence, before training where it can be known then."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from gradlite.errors import GradLiteError
from gradlite.train.words import in_bytes


@contextmanager
def failed_writes_told(folder: Path, last_checkpoint: Callable[[], Path | None]) -> Iterator[None]:
    """Turn a write into `folder` that failed into a `GradLiteError` that says what is kept."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _why_unwritten(error)
        if reason is None:
            raise
        checkpoint = last_checkpoint()
        kept = (
            f"{str(checkpoint)!r} is kept: make room there, and --resume (without --overwrite) goes on from it"
            if checkpoint
            else "no checkpoint is there to go on from: make room, or choose another --output-dir, and begin again"
        )
        raise GradLiteError(f"{str(folder)!r} could not be written to ({reason}); {kept}.") from error


def _why_unwritten(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    if isinstance(error, SafetensorError):
        return " ".join(str(error).split())
    return "a file got onto the disk in part only" if "inline_container" in str(error) else None  # as torch.save says it


def check_room(folder: Path, weight_bytes: int, num_checkpoints: int, *, freed_bytes: int = 0) -> None:
    """Raise `GradLiteError` where the disk of `folder` has less room than a model and its checkpoints surely take.

    `freed_bytes` are those of files that go before. What optimizers keep comes on top of the weights and is not counted.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free + freed_bytes
    needed = weight_bytes * (1 + num_checkpoints)
    if free < needed:
        what = f"the model and {num_checkpoints} checkpoints take" if num_checkpoints else "the model takes"
        remedy = " or a higher --save-every" if num_checkpoints else ""
        raise GradLiteError(
            f"{str(folder)!r} is on a disk with {in_bytes(free)} free, but {what} at least {in_bytes(needed)}; "
            f"make room there, or give another --output-dir{remedy}."
        )


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a saved model holds: of PEFT's, the adapters alone."""
    if hasattr(model, "get_base_model"):
        return sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    by_place = {weight.data_ptr(): weight.nbytes for weight in model.state_dict().values()}  # tied weights are saved once
    return sum(by_place.values())  # not of parameters(), among which a method may have its own


def more_checkpoints(steps: int, done: int, every: int | None, num_there: int, num_kept: int) -> int:
    """How many checkpoints will lie there beside those that do, from step `done` to the last; old ones make way."""
    to_come = 0 if every is None else math.ceil((steps - done) / every)
    return max(0, min(num_there + to_come, num_kept) - num_there)


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a directory, however deep; 0 where it does not exist."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
