"""Which step the process's peak is taken of."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gradlite.compare import loop as loop_module
from gradlite.compare.loop import Loop
from gradlite.methods.method import Method


class Tiny(nn.Module):
    """Its loss depends on nothing but its weights; as long as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(loss=self.linear(torch.ones(input_ids.shape[1], 4)).square().mean())


@pytest.mark.parametrize(("lengths", "expected"), [((5, 6, 7, 7, 9), 12_345), ((7, 7, 7, 9, 7), None), ((7, 7, 7), None)])
def test_the_process_is_measured_on_a_batch_like_the_watched_one(
    lengths: tuple[int, ...], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "forget_peak", lambda: True)
    monkeypatch.setattr(loop_module, "anonymous_peak_bytes", lambda: 12_445)
    model = Tiny()

    def build() -> tuple[Method, LRScheduler]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Method("tiny", model, optimizer), LambdaLR(optimizer, lambda _: 1.0)

    ones = [torch.ones(2, length, dtype=torch.long) for length in lengths]
    loop = Loop(build, torch.device("cpu"), 1.0, weight_bytes=80, anonymous_bytes=100)
    loop.run([{"input_ids": one, "attention_mask": one} for one in ones], lambda _: None)
    memory = loop.measured.memory
    assert memory is not None
    assert memory.process_peak_above_weights_bytes == expected
    assert memory.peak_above_weights_bytes > 0
    assert "memory of step" not in (memory.note or "")


def test_the_process_is_measured_above_the_weights_that_a_method_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the live tensors are: of 180 bytes that were loaded 80 are left, and the 100 that were freed are no saving."""
    monkeypatch.setattr(loop_module, "forget_peak", lambda: True)
    monkeypatch.setattr(loop_module, "anonymous_peak_bytes", lambda: 12_445)
    model = Tiny()

    def build() -> tuple[Method, LRScheduler]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Method("tiny", model, optimizer), LambdaLR(optimizer, lambda _: 1.0)

    ones = torch.ones(2, 7, dtype=torch.long)
    loop = Loop(build, torch.device("cpu"), 1.0, weight_bytes=180, anonymous_bytes=200)
    loop.run([{"input_ids": ones, "attention_mask": ones}] * 4, lambda _: None)
    assert loop.measured.memory is not None
    assert loop.measured.memory.process_peak_above_weights_bytes == 12_345


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_too_short_for_the_reported_step_says_which_step_it_is(steps: int) -> None:
    model = Tiny()

    def build() -> tuple[Method, LRScheduler]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Method("tiny", model, optimizer), LambdaLR(optimizer, lambda _: 1.0)

    ones = torch.ones(2, 7, dtype=torch.long)
    loop = Loop(build, torch.device("cpu"), 1.0, weight_bytes=80, anonymous_bytes=None)
    loop.run([{"input_ids": ones, "attention_mask": ones}] * steps, lambda _: None)
    memory = loop.measured.memory
    assert memory is not None
    assert memory.note is not None
    assert f"memory of step {steps}, not 3" in memory.note
