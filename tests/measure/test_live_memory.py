"""Watched steps of models whose tensors can be counted by hand."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradlite.measure.allocations import ByCategory
from gradlite.measure.live_memory import AllocationWatch, weight_bytes

WIDTH, ROWS = 512, 256
MATRIX = WIDTH * WIDTH * 4
ACTIVATION = ROWS * WIDTH * 4
SMALL = 64 * 1024  # scalars, and the like


class Square(torch.autograd.Function):
    """Keeps its input as an attribute, where no hook on saved tensors sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.clone()
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.kept


class Three(nn.Module):
    def __init__(self, square: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.square, self.checkpointed = square, checkpointed

    def part(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = Square.apply(x) if self.square else x.relu()
        return x

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.part, x, use_reentrant=False) if self.checkpointed else self.part(x)
        return result.sum()


def peaks(model: nn.Module, steps: int = 2, fused: bool = False) -> list[ByCategory]:
    """Watched steps with AdamW; where ``fused``, every gradient is used and dropped as soon as it is there (SGD)."""
    x = torch.randn(ROWS, WIDTH)
    with AllocationWatch(torch.device("cpu")) as watch:
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        if fused:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(apply_and_drop)
        for _ in range(steps):
            with watch.step(model, optimizer) as marks:
                loss = model(x)
                marks.forward_ended()
                loss.backward()
                marks.backward_ended()
                if not fused:
                    optimizer.step()
                optimizer.zero_grad()
                del loss
    return watch.peaks


@torch.no_grad()
def apply_and_drop(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.sub_(1e-3 * parameter.grad)
    parameter.grad = None


def near(found: int, wanted: int) -> bool:
    return abs(found - wanted) <= SMALL


def test_adamw_holds_gradients_and_two_moments() -> None:
    first, second = peaks(Three())
    # the peak is in AdamW's step, which computes with lists of whole tensors: no activation lives any longer
    assert near(second.weights, 3 * MATRIX)
    assert near(second.gradients, 3 * MATRIX)
    assert near(second.optimizer_state, 6 * MATRIX)
    assert near(second.held_activations, 0)
    assert second.temporaries >= MATRIX
    assert near(first.optimizer_state, 6 * MATRIX)  # moments are made in the first step and stay: state as well


def test_gradients_that_are_used_at_once_are_never_there_together() -> None:
    peak = peaks(Three(), fused=True)[-1]
    assert near(peak.gradients, MATRIX)
    assert near(peak.optimizer_state, 0)
    # one update (1e-3 · gradient) and the gradient on its way to the layer below; ReLU's results are held
    assert peak.weights + peak.gradients < peak.total < 3 * MATRIX + 2 * MATRIX + 6 * ACTIVATION + SMALL


def test_what_the_forward_pass_leaves_is_held() -> None:
    def held(model: nn.Module) -> ByCategory:
        x = torch.randn(ROWS, WIDTH)
        with AllocationWatch(torch.device("cpu")) as watch, watch.step(model, torch.optim.SGD(model.parameters())) as marks:
            loss = model(x)
            big = torch.empty(50 * MATRIX // 4)  # the peak lies at the end of the forward pass
            del big
            marks.forward_ended()
            loss.backward()
            model.zero_grad()
            del loss
        return watch.peaks[0]

    assert near(held(Three()).held_activations, 3 * ACTIVATION)
    assert near(held(Three(checkpointed=True)).held_activations, 0)
    # what Square keeps as an attribute, and its results, which the next linear layer saves; the last one nobody needs
    assert near(held(Three(square=True)).held_activations, 5 * ACTIVATION)


def test_shared_storages_count_once() -> None:
    model = Three()
    model.layers[1].weight = model.layers[0].weight
    assert sum(weight_bytes(model).values()) == 2 * MATRIX


def test_hooks_are_gone_after_the_step() -> None:
    model = Three()
    peaks(model)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
