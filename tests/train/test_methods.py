"""Whole runs with methods other than GradLite: a model or an adapter, resumed runs, what is refused, what goes bad."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM

from gradlite.errors import GradLiteError
from gradlite.train import callback as callback_module
from gradlite.train import trainer as trainer_module
from gradlite.train.loss import summed_loss
from gradlite.train.run import _Run

Train = Callable[..., Any]  # the fixture's function: settings → what the run left
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # from within PEFT

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw8bit": {"lr": 1e-3, "method_options": {"in_backward": True}},
    "lomo": {"lr": 0.1, "method_options": {"checkpointing": True}},
    "galore": {"lr": 5e-3, "method_options": "{rank: 8, update_proj_gap: 2}"},
    "ldadam": {"lr": 2e-3, "accumulation": 2},
    "badam": {"lr": 5e-3, "method_options": {"switch_block_every": 2}},
    "lora": {"lr": 2e-2, "method_options": {"dropout": 0.1}},
    "mesp": {"lr": 2e-2, "lora_rank": 4},
    "mebp": {"lr": 2e-2, "lora_rank": 4},
    "mezo": {"lr": 2e-3, "max_steps": 40},
}


ADAPTERS = ("lora", "mesp", "mebp")


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    gc.freeze()  # BAdam's package collects all garbage at every switch
    with torch.compiler.set_stance("force_eager"):  # torchao's kernels would be compiled for these shapes
        yield
    gc.unfreeze()


def weights(folder: Path, method: str) -> dict[str, Tensor]:
    loader = AutoPeftModelForCausalLM if method in ADAPTERS else AutoModelForCausalLM
    return dict(loader.from_pretrained(folder).state_dict())


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("method", SETTINGS)
def test_a_run_trains_and_resumes_to_the_same_model(train: Train, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    settings = {"method": method, "max_steps": 8, "save_every": 3, "batch_size": 4, **SETTINGS[method]}
    whole = train(name="whole", **settings)
    record = whole.record()
    assert record["loss_after"] < 0.99 * record["loss_before"]
    assert record["method"] == method
    assert set(record["state_bytes"]) == {"optimizer", "gradients"}
    assert f"trained by {method}" in whole.shown
    assert ("  gradient " in whole.shown) == (
        method not in ("lomo", "adamw8bit", "mezo")
    )  # no gradient outlives their backward pass
    assert "nan" not in whole.shown
    card = (whole.path / "README.md").read_text()
    assert f"the method `{method}`" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == ("peft" if method in ADAPTERS else "transformers")
    assert (whole.path / "adapter_model.safetensors").exists() == (method in ADAPTERS)
    assert (whole.path / "model.safetensors").exists() == (method not in ADAPTERS)

    original = _Run._record_step

    def record_then_die(self: _Run, report: callback_module.StepReport) -> None:
        original(self, report)
        if report.step == 5:
            monkeypatch.setattr(_Run, "_record_step", original)
            raise Interrupted

    monkeypatch.setattr(_Run, "_record_step", record_then_die)
    with pytest.raises(Interrupted):
        train(name="parts", **settings)
    parts = train(name="parts", resume=True, **settings)
    assert "going on from" in parts.shown
    expected, resumed = weights(whole.path, method), weights(parts.path, method)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert parts.record()["loss_after"] == record["loss_after"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "lomo", "accumulation": 2}, "cannot accumulate gradients, so --accumulation must be 1, not 2"),
        (
            {"method": "adalomo", "max_grad_norm": 1.0},
            "--max-grad-norm must be left out or 0, or build the method with clip_grad",
        ),
        ({"method": "lora", "method_options": {"rnak": 8}}, "has no option 'rnak'; did you mean 'rank'"),
        ({"method": "galore", "method_options": {"rank": "high"}}, "rank is 'high', but it should be a valid integer"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_anything_is_written(
    train: Train, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(GradLiteError, match=sentence) as error:
        train(**settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_resuming_with_another_method_is_refused(train: Train) -> None:
    train(method="adamw", save_every=3)
    with pytest.raises(GradLiteError, match=r"method \('adamw' then, 'foam' now\)"):
        train(method="foam", save_every=3, resume=True, max_steps=12)


@pytest.mark.parametrize("method", ["adamw", "lomo"])
def test_losses_that_are_not_finite_are_skipped_and_stop_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    bad_steps = {2}
    calls = [0]

    def bad(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        loss, count = summed_loss(model, inputs)
        if torch.is_grad_enabled():
            calls[0] += 1
        return (loss + torch.nan if calls[0] in bad_steps and torch.is_grad_enabled() else loss), count

    monkeypatch.setattr(trainer_module, "summed_loss", bad)
    outcome = train(method=method)
    assert outcome.record()["skipped_steps"] == 1
    assert "skipped 1" in outcome.shown
    assert all(tensor.isfinite().all() for tensor in weights(outcome.path, method).values())

    bad_steps.update(range(4, 100))
    calls[0] = 0
    with pytest.raises(GradLiteError, match="10 steps in a row"):
        train(method=method, name="bad", max_steps=40)
    assert not (tmp_path / "runs" / "bad" / "model.safetensors").exists()
