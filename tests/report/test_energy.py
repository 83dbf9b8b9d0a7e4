"""Shares of weights as means over layers, in the model's order."""

from typing import Any

import pytest

from gradlite.compare.energy import layer_of
from gradlite.report.energy import energy_of, mean_line


def test_layers_are_numbered_modules_and_the_rest() -> None:
    assert layer_of("model.layers.12.self_attn.q_proj.weight") == "layer 12"
    assert layer_of("transformer.h.3.mlp.c_fc.weight") == "layer 3"
    assert layer_of("model.embed_tokens.weight") == "embed_tokens"
    assert layer_of("lm_head.weight") == "lm_head"


def test_means_keep_gaps_and_sort_by_number() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0},
        {
            "step": 10,
            "energy": {"model.layers.10.a.weight": 0.25, "model.layers.2.a.weight": 0.5, "model.layers.2.b.weight": 0.7},
        },
        {"step": 20, "energy": {"model.embed.weight": 1.0, "model.layers.2.a.weight": 0.4}},
        {"step": 30, "energy": {}},
    ]
    found = energy_of(lines)
    assert found is not None
    assert found.layers == ["embed", "layer 2", "layer 10"]
    assert found.steps == [10, 20]
    assert found.inside[0] == [None, pytest.approx(0.6), 0.25]
    assert found.inside[1] == [1.0, 0.4, None]
    steps, means = mean_line(found)
    assert steps == [10.0, 20.0]
    assert means == pytest.approx([0.425, 0.7])
    assert energy_of(lines[:1]) is None


def test_a_share_that_was_not_a_number_counts_as_not_measured() -> None:
    found = energy_of([{"step": 10, "energy": {"h.1.a.weight": None, "h.2.a.weight": 0.5}}])
    assert found is not None
    assert (found.layers, found.inside) == (["layer 2"], [[0.5]])
    assert energy_of([{"step": 10, "energy": {"h.1.a.weight": None}}]) is None
