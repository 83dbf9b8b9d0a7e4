"""What a page is made of: records of comparisons, or the directory of one training run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gradlite.compare.record import Record
from gradlite.errors import GradLiteError
from gradlite.train.yaml_file import read_mapping
from gradlite.validation import in_words

_RECORDS = "records"  # in the directory of a comparison
_RUN, _CONFIG, _METRICS = "run.json", "config.yaml", "metrics.jsonl"  # as gradlite.train.directory names them


@dataclass(frozen=True)
class TrainedRun:
    """A directory of `gradlite train`: run.json, config.yaml, and the lines of metrics.jsonl."""

    name: str
    result: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """The finite numbers of one key, and of ``against`` beside them, in the order of the file."""
        pairs = [
            (float(line[against]), float(line[key]))
            for line in self.metrics
            if _is_number(line.get(key)) and _is_number(line.get(against))
        ]
        return [x for x, _ in pairs], [y for _, y in pairs]


@dataclass(frozen=True)
class Records:
    """Records of any number of experiments. ``left_out``: files of the directories given that hold none."""

    records: list[Record]
    left_out: list[str]


def read(paths: Sequence[Path]) -> Records | TrainedRun:
    """Read what was given: one run's directory, or any number of record files (.json, .jsonl) and directories of them.

    Raises GradLiteError, in one sentence, for a path that is missing, unreadable, or holds neither.
    """
    for path in paths:
        if not path.exists():
            raise GradLiteError(f"there is no {path}; give a run's directory, or records of `gradlite compare`.")
    runs = [path for path in paths if path.is_dir() and (path / _RUN).is_file()]
    if runs and len(paths) > 1:
        raise GradLiteError(f"{runs[0]} is the directory of one run, which has a page of its own; give it alone.")
    if runs:
        return _read_run(runs[0])
    records: list[Record] = []
    left_out: list[str] = []
    for path in (path / _RECORDS if (path / _RECORDS).is_dir() else path for path in paths):
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
        for file in files:
            entries = _entries(file)
            if path.is_dir() and not any(_is_record(entry) for _, entry in entries):
                left_out.append(file.name)
            else:
                records += [_record(place, entry) for place, entry in entries]
    if not records:
        raise GradLiteError(
            f"{paths[0]} holds no records; `gradlite compare` writes them, and `gradlite train` a run's directory."
        )
    return Records(records, left_out)


def _read_run(folder: Path) -> TrainedRun:
    result = _json(folder / _RUN, _text(folder / _RUN))
    config = read_mapping(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    # A run that was killed may have left half a line, which the next resume cuts off.
    lines = _text(folder / _METRICS).splitlines(keepends=True) if (folder / _METRICS).is_file() else []
    metrics = [_json(folder / _METRICS, line) for line in lines if line.endswith("\n")]
    if not isinstance(result, dict) or not all(isinstance(line, dict) for line in metrics):
        raise GradLiteError(f"{folder} is not the directory of a GradLite run; its {_RUN} or {_METRICS} holds something else.")
    for key in ("versions", "machine"):
        if not _is_facts(result.get(key) or {}):
            raise GradLiteError(f"{key} in {folder / _RUN} is no mapping from a name to what it says; make the run anew.")
    for line in metrics:
        if isinstance(line.get("energy"), dict) and not _is_energy(line):
            raise GradLiteError(
                f"energy in {folder / _METRICS} is no mapping from a weight to its share at a step; make the run anew."
            )
    return TrainedRun(folder.resolve().name, result, config, metrics)


def _entries(file: Path) -> list[tuple[str, Any]]:
    """The JSON values of a file, each with the words that say where it stands."""
    text = _text(file)
    if file.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        return [(f"{file}, line {number}", _json(file, line)) for number, line in lines if line.strip()]
    return [(str(file), _json(file, text))]


def _record(place: str, entry: Any) -> Record:
    if not _is_record(entry):
        raise GradLiteError(f"{place} is no record of a training run; `gradlite compare` writes those.")
    if not _is_facts(entry.get("machine") or {}):
        raise GradLiteError(f"machine in {place} is no mapping from a name to what it says; leave the record out.")
    try:
        return Record.model_validate(entry)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "it"
        raise GradLiteError(
            f"{place} is no whole record ({in_words(problem, key)}); leave it out, or have `gradlite compare` make it anew."
        ) from None


def _is_record(entry: Any) -> bool:
    """The theorem's experiments have records of their own, with tables and a plot beside them."""
    return isinstance(entry, dict) and "record_version" in entry and entry.get("experiment") != "theorem"


def _is_facts(value: Any) -> bool:
    """Names and what they say: numbers for bytes, anything else for the rest."""
    if not isinstance(value, dict):
        return False
    return all(said is None or _is_number(said) for name, said in value.items() if name.endswith("_bytes"))


def _is_energy(line: dict[str, Any]) -> bool:
    """Shares at a step; null is how a run writes a share that was NaN."""
    return isinstance(line.get("step"), int) and all(share is None or _is_number(share) for share in line["energy"].values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise GradLiteError(f"{file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise GradLiteError(f"{file} is not UTF-8 text; give records of `gradlite compare` or a run's directory.") from None


def _json(file: Path, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise GradLiteError(f"{file} is not JSON ({error}); delete it, or make its run anew.") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
