"""What every benchmark record carries beside its figures: versions, machine, command, date."""

import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gradlite.measure.versions import versions


def describe() -> dict[str, Any]:
    """The fields that say where and how a record was made; paths given on the command line are shown by name only."""
    words = [Path(word).name if Path(word).is_absolute() or word.startswith("..") else word for word in sys.argv[1:]]
    return {
        "versions": versions(),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
        },
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "date": time.strftime("%Y-%m-%d"),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
