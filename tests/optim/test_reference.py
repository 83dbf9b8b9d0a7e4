"""The fast optimizer follows the reference twin, and AdamW itself where the basis is all of the space."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import gradlite
from gradlite.attaching import attachment_of
from gradlite.optim.reference import ReferenceBasis, ReferenceGradLite

Feedback = Literal["feedback", "same_step", "off"]


def sample_everything(model: nn.Module) -> None:
    """Makes the residual sample the residual itself."""
    attachment = attachment_of(model)
    assert attachment is not None
    for collector in attachment.window.collectors:
        collector.sample_count = 10_000


def reference_bases(model: nn.Module) -> list[ReferenceBasis]:
    attachment = attachment_of(model)
    assert attachment is not None
    window, names = attachment.window, [name for name, _ in attachment.projected]
    bases = []
    for basis in window.bases():
        assert basis.matrix_NR is not None
        members = [name for name, c in zip(names, window.collectors, strict=True) if c.basis is basis]
        bases.append(ReferenceBasis(basis.matrix_NR.clone(), members))
    return bases


def model_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("feedback", ["feedback", "same_step", "off"])
def test_fast_optimizer_follows_the_twin(
    feedback: Feedback, tiny_model: Callable[..., nn.Module], batches: Callable[..., list[Tensor]]
) -> None:
    fast, plain = tiny_model(), tiny_model()
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "refresh_interval": 3, "feedback": feedback}
    optimizer = gradlite.GradLite(fast, rank=6, feedback_memory="fp32", moments="fp32", **settings)
    sample_everything(fast)
    weights = dict(plain.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    twin = None
    for ids in batches(60):
        fast(ids).backward()
        if twin is None:
            bases = reference_bases(fast)
            assert sorted(len(basis.members) for basis in bases) == [1, 1, 1, 2, 3]
            twin = ReferenceGradLite({name: weight.data for name, weight in weights.items()}, bases, **settings)
        optimizer.step()
        optimizer.zero_grad()
        twin.step(model_gradients(plain, ids))
        for name, weight in fast.named_parameters():
            if name in weights:
                torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-8)
    moved = max((weights[name] - start[name]).abs().max().item() for name in start)
    assert moved > 0.05  # or the comparison would say nothing


@pytest.mark.parametrize("tied", [True, False])
def test_full_rank_equals_adamw_in_a_rotated_basis(
    tied: bool, tiny_model: Callable[..., nn.Module], batches: Callable[..., list[Tensor]]
) -> None:
    fast, plain = tiny_model(tied=tied), tiny_model(tied=tied)
    optimizer = gradlite.GradLite(fast, lr=2e-3, rank=1.0, feedback="off", moments="fp32", basis="random", weight_decay=0.05)
    rotations: dict[str, Tensor] = {}
    rotated: dict[str, nn.Parameter] = {}
    oracle: torch.optim.Optimizer | None = None
    for ids in batches(30):
        fast(ids).backward()
        if oracle is None:
            rotations = {name: basis.matrix_NR for basis in reference_bases(fast) for name in basis.members}
            rotated = {
                name: nn.Parameter(weight.detach() @ rotations[name] if name in rotations else weight.detach().clone())
                for name, weight in plain.named_parameters()
            }
            decayed = [weight for weight in rotated.values() if weight.dim() > 1]
            vectors = [weight for weight in rotated.values() if weight.dim() == 1]
            groups = [{"params": decayed, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
            oracle = torch.optim.AdamW(groups, lr=2e-3)
        optimizer.step()
        optimizer.zero_grad()
        for name, grad in model_gradients(plain, ids).items():
            rotated[name].grad = grad @ rotations[name] if name in rotations else grad.clone()
        oracle.step()
        for name, weight in plain.named_parameters():
            turned = rotated[name].detach()
            weight.data.copy_(turned @ rotations[name].T if name in rotations else turned)
            torch.testing.assert_close(fast.get_parameter(name), weight, rtol=0, atol=1e-8)
    assert set(rotations) >= {"embed.weight", "q.weight", "down.weight"}
