"""A run's directory: what it holds already, whether this run may have it, and its records.

    run.json        made by GradLite; status, losses, answers; marks the directory as ours
    config.yaml     every setting of the run
    metrics.jsonl   one line a step, one a held-out evaluation
    checkpoints/    checkpoint-N, whole or absent
    README.md, loss.png, model and tokenizer, once the run is finished

A directory without a run.json of ours is never written to (unless it is empty) and never deleted.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from gradlite.errors import GradLiteError
from gradlite.train.config import TrainConfig
from gradlite.train.disk import failed_writes_told
from gradlite.train.files import WRITING, check_writable, finite, write_json, write_text

RECORD, CONFIG, METRICS, CHECKPOINTS = "run.json", "config.yaml", "metrics.jsonl", "checkpoints"
_MADE_BY = "gradlite"
# Settings that may differ between a run and its continuation; all others decide what the run computes.
_FREE_ON_RESUME = {
    "resume", "overwrite", "output_dir", "name", "report_to", "eval_every", "save_every", "max_steps", "epochs",
}  # fmt: skip


def _other_process(record: Mapping[str, Any] | None) -> int | None:
    """The process that a record says is training, if it is another one of this machine and still there."""
    if record is None or record.get("status") != "running" or record.get("host") != platform.node():
        return None
    process = record.get("process")
    if not isinstance(process, int) or process == os.getpid():
        return None
    if record.get("process_started") not in (None, _started(process)):
        return None  # the system has given the number to another process since
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:  # somebody else's
        return process
    return process


def _started(process: int) -> str | None:
    """When a process began, in the system's ticks; None where the system (Linux) does not tell."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return status.rpartition(")")[2].split()[19]


def _step_of(line: str) -> int:
    """The step that a line of metrics.jsonl is of; -1 for a damaged line, which a continued run leaves out."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return -1
    return step if isinstance(step, int) else -1


class RunDirectory:
    """The directory of one run. Nothing is written before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / METRICS
        self.checkpoints = path / CHECKPOINTS

    @property
    def record(self) -> dict[str, Any] | None:
        """What run.json says, or None where it is missing or not ours."""
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get("made_by") == _MADE_BY else None

    @property
    def is_finished(self) -> bool:
        record = self.record
        return record is not None and record.get("status") == "finished"

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step, or None."""
        return last_checkpoint(self.checkpoints)

    def failed_writes_told(self) -> AbstractContextManager[None]:
        """Around whatever writes here: a write that fails is told in one sentence."""
        return failed_writes_told(self.path, self.last_checkpoint)

    def check(self, config: TrainConfig) -> None:
        """Raise `GradLiteError` unless this run may use the directory: new, empty, or to be resumed or replaced."""
        check_writable(self.path)
        if self.path.is_symlink():
            raise GradLiteError(f"{str(self.path)!r} is a link, not a plain directory; choose another --name or --output-dir.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if self.record is None:
            raise GradLiteError(
                f"{str(self.path)!r} holds files that are not a GradLite run's, and is left alone; "
                "choose another --name or --output-dir."
            )
        if config.overwrite:
            return
        busy = _other_process(self.record)
        if busy is not None:
            remedy = 'take "process" out of its run.json' if config.resume else "--overwrite"
            raise GradLiteError(
                f"process {busy} is training in {str(self.path)!r}; wait for its end, or give another --name "
                f"({remedy}, if there is no such training any more)."
            )
        if config.resume:
            self._check_same(config)
        elif self.is_finished:
            raise GradLiteError(
                f"{str(self.path)!r} holds a finished run; give --overwrite to replace it, "
                + ("--resume to go on with more steps, " if self.last_checkpoint() else "")
                + "or another --name."
            )
        elif self.last_checkpoint():
            raise GradLiteError(
                f"{str(self.path)!r} holds an unfinished run with a checkpoint; give --resume to go on with it, "
                "--overwrite to begin again, or another --name."
            )

    def _check_same(self, config: TrainConfig) -> None:
        before, now = (
            settings.model_dump(mode="json") for settings in (TrainConfig.from_sources(self.path / CONFIG, {}), config)
        )
        changed = [key for key in now if key not in _FREE_ON_RESUME and before[key] != now[key]]
        if changed:
            told = ", ".join(f"{key} ({before[key]!r} then, {now[key]!r} now)" for key in changed)
            raise GradLiteError(f"cannot resume {str(self.path)!r} with other settings: {told}.")

    def begin(self, config: TrainConfig, record: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Take the directory: emptied for a new run, or cut back to what was known at `checkpoint`."""
        self.check(config)
        with self.failed_writes_told():
            self._take(config, record, checkpoint)

    def _take(self, config: TrainConfig, record: Mapping[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is None and self.path.exists():
            if self.record is not None:
                shutil.rmtree(self.path)
            else:
                self.path.rmdir()  # empty, or it would not have passed the check
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoints):
            for left_over in folder.glob(f"{WRITING}*"):  # by a process that was killed
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        mine = {"process": os.getpid(), "process_started": _started(os.getpid()), "host": platform.node()}
        self.write_record({**record, "status": "running", **mine})
        write_text(self.path / CONFIG, config.afresh().to_yaml())
        if checkpoint is not None:
            step = checkpoint_step(checkpoint)
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.metrics.exists() else []
            complete = [line for line in lines if line.endswith("\n")]
            write_text(self.metrics, "".join(line for line in complete if 0 <= _step_of(line) <= step))

    def write_record(self, record: Mapping[str, Any]) -> None:
        write_json(self.path / RECORD, {"made_by": _MADE_BY, **record})

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, and see it to the disk: a run that is killed keeps its history."""
        with self.failed_writes_told(), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in `folder`, or None."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(found) if found else None


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps done at a checkpoint, from its name."""
    return int(checkpoint.name.rsplit("-", 1)[1])
