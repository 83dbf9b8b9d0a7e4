"""Names of models and data sets that can only be paths, and what is missing there. Light: nothing is loaded."""

import re
from pathlib import Path

from gradlite.errors import GradLiteError
from gradlite.train.config import DEFAULT_MODEL

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_model(name: str) -> None:
    """Raise `GradLiteError` for a model that is no hub id, not the embedded one, and not there either."""
    path = _expanded("model", name)
    if name == DEFAULT_MODEL or (path.suffix == ".gguf" and path.is_file()):
        return
    if is_local_model(name) and not (path / "config.json").is_file():
        raise GradLiteError(
            f"model {name!r} is not a directory with a config.json; give a directory in Hugging Face format, "
            "a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )


def is_local_model(name: str) -> bool:
    """Whether `name` is there, or can only be a path: hub ids are `model` or `owner/model`."""
    can_only_be = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith(".gguf")
    return can_only_be or _expanded("model", name).exists()


def check_dataset(name: str) -> None:
    """Raise `GradLiteError` for a data set that is no hub id and not there either."""
    path = _expanded("dataset", name)
    if not path.exists() and (path.suffix.lower() in DATA_SUFFIXES or not _HUB_ID.fullmatch(name)):
        raise GradLiteError(
            f"dataset {name!r} does not exist; give a jsonl, json, csv or parquet file, a directory, or a hub id."
        )


def _expanded(kind: str, name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~somebody
        raise GradLiteError(f"{kind} {name!r} does not exist: {error}") from error
