"""Files that are whole or absent: everything is written under a temporary name and renamed."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradlite.errors import GradLiteError

WRITING = ".writing-"
"""What names of files and directories that are not whole yet begin with."""


def check_writable(folder: Path) -> None:
    """Raise `GradLiteError` for a directory that is none, or where nothing can be written; a new one can be made."""
    path = folder.absolute()
    nearest = next(there for there in (path, *path.parents) if os.access(there, os.F_OK))
    if not nearest.is_dir() or not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        raise GradLiteError(f"{str(nearest)!r} is not a directory that can be written to; choose another --output-dir.")


def write_text(path: Path, text: str) -> None:
    """Write a text file at once: readers see the old one or the new one, never half of it."""
    handle, name = tempfile.mkstemp(prefix=WRITING, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        make_readable(Path(name))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file at once; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary directory whose files move into `target` when the block ends well, and vanish when it does not."""
    with tempfile.TemporaryDirectory(prefix=WRITING, dir=target) as name:
        yield Path(name)
        for entry in sorted(Path(name).iterdir()):
            destination = target / entry.name
            if destination.is_dir():
                shutil.rmtree(destination)
            if entry.is_file():
                make_readable(entry)
            entry.replace(destination)


def make_readable(file: Path) -> None:
    """Give a file the mode of an ordinary new file: temporary ones (and safetensors') are private to their owner."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def finite(value: Any) -> Any:
    """`value` with None for every number in it that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
