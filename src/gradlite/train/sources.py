"""From the name of a data set to its rows: a local file or directory, or one on the hub. Columns mean nothing here.

Rows are mappings from column to value. Local jsonl, json and csv are read directly, so that a damaged line is named.
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from gradlite.errors import GradLiteError
from gradlite.train.local_names import DATA_SUFFIXES, check_dataset

Rows = Sequence[Mapping[str, Any]]

_HELD_OUT_NAMES = ("validation", "valid", "dev", "eval", "heldout", "held-out", "held_out", "test")


@dataclass(frozen=True)
class Source:
    """A data set's rows. `held_out` is its own held-out split, or None where it has none."""

    train: Rows
    held_out: Rows | None


def load_source(name: str, configuration: str | None = None) -> Source:
    """Read a data set by path (jsonl, json, csv, parquet, or a directory of such files) or by hub id.

    `configuration` chooses one of those that a data set on the hub may have.

    Raises `GradLiteError` where it is missing, unreadable or empty.
    """
    check_dataset(name)
    path = Path(name).expanduser()
    if configuration is not None and path.exists():
        raise GradLiteError(
            f"dataset {name!r} is local, and only data sets on the hub have configurations; leave out --dataset-config."
        )
    if path.is_dir():
        source = _from_directory(path)
    elif path.is_file():
        source = Source(_read_file(path), None)
    else:
        source = _from_hub(name, configuration)
    if len(source.train) == 0:
        raise GradLiteError(f"dataset {name!r} has no rows.")
    return source


def _from_directory(folder: Path) -> Source:
    """A directory saved by the datasets library, or one of data files, some perhaps called test or validation."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            return _from_splits(datasets.load_from_disk(str(folder)), str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise GradLiteError(f"cannot read dataset {str(folder)!r}: {error}") from error
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in DATA_SUFFIXES)
    if not files and (folder / "data").is_dir():
        files = sorted(file for file in (folder / "data").iterdir() if file.suffix.lower() in DATA_SUFFIXES)
    if not files:
        raise GradLiteError(f"dataset directory {str(folder)!r} holds no jsonl, json, csv or parquet file.")
    by_split = {split: [file for file in files if _is_split(file, split)] for split in ("train", *_HELD_OUT_NAMES)}
    held_out_files = next((by_split[split] for split in _HELD_OUT_NAMES if by_split[split]), [])
    train_files = by_split["train"] or [file for file in files if not any(file in by_split[s] for s in _HELD_OUT_NAMES)]
    if not train_files:
        train_files, held_out_files = held_out_files, []
    held_out = [row for file in held_out_files for row in _read_file(file)]
    return Source([row for file in train_files for row in _read_file(file)], held_out or None)


def _is_split(file: Path, split: str) -> bool:
    """`test.jsonl`, `test-00000-of-00001.parquet` and `test_v2.csv` are files of the split `test`."""
    return re.fullmatch(rf"{re.escape(split)}([-_.].*)?", file.stem.lower()) is not None


def _from_hub(name: str, configuration: str | None) -> Source:
    try:
        return _from_splits(datasets.load_dataset(name, configuration), name)
    except GradLiteError:
        raise
    except Exception as error:  # the hub client raises its own errors, requests' and those of each file format
        choice = re.search(r"available configs: (\[.*\])", str(error))
        if choice:
            raise GradLiteError(
                f"dataset {name!r} has several configurations: give one of {choice[1]} as --dataset-config "
                "(which is --dataset's; for --eval-dataset give a data set with one configuration)."
            ) from error
        reason = str(error).strip().splitlines()
        raise GradLiteError(
            f"dataset {name!r} is neither a local file or directory nor could it be loaded from the hub: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def _from_splits(loaded: Any, name: str) -> Source:
    if isinstance(loaded, datasets.Dataset):
        return Source(loaded, None)
    splits = dict(loaded)
    held_out = next((splits[split] for split in _HELD_OUT_NAMES if split in splits), None)
    if "train" in splits:
        return Source(splits["train"], held_out)
    if len(splits) == 1:
        return Source(next(iter(splits.values())), None)
    raise GradLiteError(f"dataset {name!r} has no split called train; it has {', '.join(splits)}.")


def _read_file(file: Path) -> Rows:
    try:
        suffix = file.suffix.lower()
        if suffix == ".jsonl":
            return _read_jsonl(file)
        if suffix == ".json":
            return _read_json(file)
        if suffix == ".csv":
            return _read_csv(file)
        if suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(file), keep_in_memory=True)
    except GradLiteError:
        raise
    except Exception as error:  # pyarrow's and the csv module's errors share no base class
        raise GradLiteError(f"cannot read dataset {str(file)!r}: {str(error).strip() or type(error).__name__}") from error
    raise GradLiteError(f"dataset {str(file)!r} is of no known kind; give a .jsonl, .json, .csv or .parquet file.")


def _read_jsonl(file: Path) -> Rows:
    rows = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once_each)
            except json.JSONDecodeError as error:
                raise GradLiteError(f"line {number} of dataset {str(file)!r} is not JSON: {error.msg}.") from error
            except ValueError as error:
                raise GradLiteError(f"line {number} of dataset {str(file)!r}: {error}.") from error
            if not isinstance(row, dict):
                raise GradLiteError(f"line {number} of dataset {str(file)!r} is not a JSON object.")
            rows.append(row)
    return rows


def _read_json(file: Path) -> Rows:
    """A JSON list of objects, or one object a line under the name .json, as many data sets have it."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise GradLiteError(f"line {error.lineno} of dataset {str(file)!r} is not JSON: {error.msg}.") from error
        return _read_jsonl(file)
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise GradLiteError(f"dataset {str(file)!r} is not a JSON list of objects.")
    return rows


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A row from its columns and values. Raises ValueError where a column stands twice: one of the values would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(column for number, (column, _) in enumerate(pairs) if column in dict(pairs[:number]))
        raise ValueError(f"the column {twice!r} stands twice")
    return row


def _read_csv(file: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # not 131,072 characters
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        header = reader.fieldnames or ()
        _once_each([(column, None) for column in header])
        if len(header) == 1 and re.search(r"\w[;\t]\s*\w", header[0]):
            raise GradLiteError(f"dataset {str(file)!r} has the header {header[0]!r}; separate its columns by commas.")
        rows = []
        for row in reader:
            if None in row:
                raise GradLiteError(f"line {reader.line_num} of dataset {str(file)!r} has more fields than the header.")
            rows.append(dict(row))
        return rows
