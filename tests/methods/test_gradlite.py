"""What GradLite refuses, in one sentence that names the culprit."""

from typing import Any

import pytest
from torch import nn

import gradlite


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"betas": (1.0, 0.9)}, "betas.0. must be in"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"refresh_interval": 0}, "refresh_interval must be a whole number"),
        ({"refresh_interval": 2.5}, "refresh_interval must be a whole number"),
        ({"groups": [{"lr": 1.0}]}, 'a group needs "params"'),
    ],
)
def test_bad_keywords_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(gradlite.GradLiteError, match=message):
        gradlite.GradLite(nn.Linear(32, 32), **keywords)


def test_parameters_are_no_model() -> None:
    with pytest.raises(gradlite.GradLiteError, match="pass the model"):
        gradlite.GradLite(list(nn.Linear(32, 32).parameters()))  # type: ignore[arg-type]


def test_a_pattern_may_stand_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    coverage = gradlite.attach(model, rank=4, include="0.*")
    assert [entry.name for entry in coverage.entries if entry.kind == "projected"] == ["0.weight"]
