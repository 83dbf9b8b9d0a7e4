"""What metrics.jsonl says of time and of the gradients' energy inside the bases."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from gradlite.train import run


def test_energy_stands_at_every_tenth_step_and_the_last(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ENERGY_EVERY", 4)
    outcome = train(refresh_interval=2, max_steps=10)
    lines = [line for line in outcome.metrics() if "energy" in line]
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"} <= lines[-1]["energy"].keys()
    assert all(0.0 <= share <= 1.0 for line in lines for share in line["energy"].values())


def test_no_energy_line_where_nothing_was_measured(train: Callable[..., Any]) -> None:
    outcome = train(basis="random", max_steps=3)
    assert not any("energy" in line for line in outcome.metrics())


def test_seconds_go_on_after_a_resume(train: Callable[..., Any]) -> None:
    first = train(save_every=3, max_steps=6).path / "metrics.jsonl"
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    lines[0]["peak_memory_bytes"] = 10**15  # more than this process will ever have
    first.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    path = train(save_every=3, max_steps=9, resume=True).path
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "loss" in line]
    assert len(seconds) == 9
    assert all(earlier <= later for earlier, later in itertools.pairwise(seconds))
    record = json.loads((path / "run.json").read_text())
    assert record["seconds"] >= seconds[-1]
    assert record["peak_memory_bytes"] == 10**15
