"""A specification of a run of the tiny model; the last ten of the forty rows are never trained on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gradlite.compare.runs import RunSpec

MakeSpec = Callable[..., RunSpec]


@pytest.fixture
def make_spec(model_dir: Path, sums: Path) -> MakeSpec:
    """Six steps of AdamW on two rows each, unless told otherwise."""

    def make(**changes: object) -> RunSpec:
        keys: dict[str, object] = {
            "experiment": "tiny",
            "run": "tiny-adamw",
            "label": "AdamW",
            "method": "adamw",
            "options": {},
            "model": str(model_dir),
            "dataset": str(sums),
            "held_out_from_last": 10,
            "held_out_rows": 4,
            "full_rows": False,
            "dtype": "float32",
            "batch_size": 2,
            "seq_len": 96,
            "steps": 6,
            "schedule": "cosine",
            "warmup_steps": 1,
            "max_grad_norm": 1.0,
            "lr": 1e-3,
            "seed": 0,
        }
        return RunSpec.model_validate({**keys, **changes})

    return make
