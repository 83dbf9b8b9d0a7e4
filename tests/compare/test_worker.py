"""One run: what its record holds, and what becomes of runs that go wrong."""

import inspect
import io
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from gradlite import methods
from gradlite.compare.loop import UNTIMED_STEPS
from gradlite.compare.runs import RunSpec
from gradlite.compare.worker import work
from gradlite.errors import GradLiteError
from gradlite.hold import compiled
from gradlite.measure.process_memory import forget_peak
from gradlite.methods.gradlite import GradLite
from gradlite.methods.method import Claims, Method

MakeSpec = Callable[..., RunSpec]


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("method", ["adamw", "gradlite"])
def test_a_run_leaves_a_whole_record(make_spec: MakeSpec, method: str, dtype: str) -> None:
    record = work(make_spec(method=method, steps=8, dtype=dtype), "gradlite compare")
    assert (record.status, record.reason) == ("ok", None)
    losses = [loss for loss in record.curve.train_loss if loss is not None]
    assert record.curve.step == list(range(1, 9))
    assert losses[-1] < losses[0]
    assert record.curve.seconds == sorted(record.curve.seconds)
    assert [one.step for one in record.held_out] == [0, 8]
    assert record.held_out[0].loss is not None
    assert record.final_held_out_loss is not None
    assert record.final_held_out_loss < record.held_out[0].loss
    assert record.held_out_tokens is not None
    assert record.held_out_tokens > 0
    assert record.evaluated_rows == 4
    assert len(record.step_seconds) == 8 - UNTIMED_STEPS
    assert record.tokens_per_second is not None
    assert record.tokens_per_second.min <= record.tokens_per_second.median <= record.tokens_per_second.max
    assert record.options == {"max_grad_norm": 1.0}
    memory = record.memory
    assert memory is not None
    assert memory.by_category_bytes is not None
    parts = memory.by_category_bytes
    assert sum(parts.model_dump().values()) == memory.peak_bytes
    # transformers keeps the rotary frequencies twice from the first forward pass on
    assert memory.peak_bytes - memory.peak_above_weights_bytes == pytest.approx(parts.weights, abs=100)
    assert parts.optimizer_state > 0
    num_parameters = 181_152 / 2  # and 32 bytes of rotary frequencies
    assert parts.weights == pytest.approx(num_parameters * (4 if dtype == "mixed" else 2), rel=1e-3)
    if method == "adamw":
        assert parts.optimizer_state == pytest.approx(2 * parts.weights, rel=0.05)
    assert record.versions["torch"] == torch.__version__
    assert record.machine["num_threads"] == 1


def test_a_record_tells_how_much_of_the_gradient_the_bases_hold(make_spec: MakeSpec) -> None:
    options = {"rank": 4, "refresh_interval": 2}
    energy = work(make_spec(method="gradlite", steps=20, options=options), "gradlite compare").energy
    assert energy is not None
    assert energy.steps == [10, 20]
    assert "layer 1" in energy.layers
    shares = [share for row in energy.inside for share in row if share is not None]
    assert len(shares) > len(energy.layers)
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert min(shares) < 0.999  # a basis of rank 4 does not hold everything
    assert work(make_spec(method="adamw", steps=10), "gradlite compare").energy is None


def test_weights_that_a_method_shrinks_are_no_saving_above_them(make_spec: MakeSpec) -> None:
    plain, coded = (work(make_spec(method="mesp", options={"base": base}, steps=6), "").memory for base in ("as it is", "int4"))
    assert plain is not None
    assert coded is not None
    for memory in (plain, coded):
        assert memory.by_category_bytes is not None
    assert coded.by_category_bytes.weights < 0.8 * plain.by_category_bytes.weights  # type: ignore[union-attr]
    beside = coded.peak_bytes - coded.by_category_bytes.weights  # type: ignore[union-attr]
    assert coded.peak_above_weights_bytes == beside


def test_a_process_with_mapped_files_has_no_peak(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gone when it is read, and would pass for anonymous memory."""
    monkeypatch.setattr(compiled._State, "usable", False)
    peaks = []
    for hold in ("recompute", "recompute-mapped"):
        record = work(make_spec(method="gradlite", options={"hold": hold}, steps=5, batch_size=30), "")
        assert record.memory is not None, record.reason
        peaks.append(record.memory.process_peak_above_weights_bytes)
    assert (peaks[0] is not None) == forget_peak()
    assert peaks[1] is None


def test_the_same_seed_gives_the_same_losses(make_spec: MakeSpec) -> None:
    first, second = (work(make_spec(steps=3), "").curve.train_loss for _ in range(2))
    assert first == second
    assert work(make_spec(steps=3, seed=1), "").curve.train_loss != first


@pytest.mark.parametrize("method", methods.names())
def test_a_method_with_a_seed_of_its_own_gets_the_runs(method: str) -> None:
    module = import_module(f"gradlite.methods.{methods._HOME[method]}")
    factory = getattr(module, method.replace("-", "_"))
    takes_seed = "seed" in inspect.signature(GradLite if method == "gradlite" else factory).parameters
    assert takes_seed == (method in methods.SEEDED)


def test_a_run_without_held_out_rows_is_measured_all_the_same(make_spec: MakeSpec) -> None:
    record = work(make_spec(held_out_rows=0, steps=1, full_rows=False), "")
    assert record.held_out == []
    assert record.held_out_tokens is None
    assert record.tokens_per_second is None  # all of its steps were watched
    assert record.memory is not None


def test_an_option_that_a_method_does_not_know_is_its_rows_reason(make_spec: MakeSpec) -> None:
    """The runner finds it before; a worker says so all the same."""
    record = work(make_spec(options={"rankk": 3}), "")
    assert record.status == "failed"
    assert record.reason is not None
    assert "rankk" in record.reason


def test_a_run_that_diverges_keeps_what_came_before(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    record = work(make_spec(lr=1e38, max_grad_norm=0.0, steps=6), "")
    assert record.status == "failed"
    assert record.reason is not None
    assert record.reason.startswith("diverged: the loss is nan at step")
    assert record.curve.train_loss[0] is not None
    assert record.curve.train_loss[-1] is None


class Breaking(Method):
    """Trains nothing until its fourth step, and breaks the weights there."""

    def __init__(self, model: torch.nn.Module, **_options: Any) -> None:
        super().__init__("breaking", model, torch.optim.SGD(model.parameters(), lr=0.0), Claims(True, False, False))
        self.steps = 0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps == 4:
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)


def test_a_run_that_diverges_late_keeps_its_memory_and_what_it_did(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "build", lambda _name, model, **options: Breaking(model, **options))
    record = work(make_spec(steps=6), "")
    assert record.reason == "diverged: the loss is nan at step 5"
    assert record.memory is not None
    assert record.options["max_grad_norm"] is None


class Failing(Method):
    """Raises in its first step."""

    def __init__(self, model: torch.nn.Module, error: Exception) -> None:
        super().__init__("failing", model, torch.optim.SGD(model.parameters(), lr=0.1))
        self.error = error

    def step(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9 bytes\nmore"), "out_of_memory", "RuntimeError: Def"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "OutOfMemoryError: CUDA out of memory"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
        (GradLiteError("install y."), "failed", "install y."),
    ],
)
def test_an_error_is_the_rows_reason(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, reason: str
) -> None:
    monkeypatch.setattr(methods, "build", lambda _name, model, **_options: Failing(model, error))
    record = work(make_spec(), "")
    assert record.status == status
    assert record.reason is not None
    assert record.reason.startswith(reason)
    assert "\n" not in record.reason


class Unclipped(Method):
    """Cannot clip, and says that it skipped a step."""

    def __init__(self, model: torch.nn.Module, **_options: Any) -> None:
        super().__init__("unclipped", model, torch.optim.SGD(model.parameters(), lr=0.1), Claims(True, False, False))
        self.skipped_steps = 1

    def clip(self, max_norm: float) -> float:
        raise AssertionError(max_norm)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def test_a_method_that_cannot_clip_is_not_asked_to(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "build", lambda _name, model, **options: Unclipped(model, **options))
    record = work(make_spec(steps=1), "")
    assert (record.status, record.options) == ("ok", {"max_grad_norm": None})
    assert record.reason == "1 steps were skipped, since their gradient was not finite"


def test_a_run_whose_comparison_is_gone_leaves_no_record(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(SystemExit):
        work(make_spec(), "")


def test_data_too_short_for_one_experiment_fails_its_rows_alone(make_spec: MakeSpec) -> None:
    record = work(make_spec(full_rows=True, seq_len=500), "")
    assert record.status == "failed"
    assert record.reason is not None
    assert "fills 500 tokens" in record.reason


def test_data_that_cannot_be_had_stops_the_comparison(make_spec: MakeSpec) -> None:
    with pytest.raises(GradLiteError, match="does not exist"):
        work(make_spec(dataset="nowhere.jsonl"), "")
