"""Stacked experts: value and all gradients against naive code in float64, and what is held."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradlite.hold.codec import EXACT, INT8, Codec
from gradlite.hold.holder import Holder
from gradlite.ops.experts import StackedWeight, experts_value, routing_of, subspace_experts
from gradlite.ops.factors import GradientFactors
from gradlite.ops.gated_mlp import gated_bytes
from gradlite.subspace.basis import random_basis

TOKENS, CHOICES, EXPERTS, WIDTH, INNER, RANK = 7, 2, 5, 12, 8, 3


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, choices (of which none is the fourth expert), their scales, and the two weights."""
    index = torch.stack([torch.tensor([0, 1, 2, 4])[torch.randperm(4)[:CHOICES]] for _ in range(TOKENS)])
    return leaf(TOKENS, WIDTH), index, leaf(TOKENS, CHOICES), leaf(EXPERTS, 2 * INNER, WIDTH), leaf(EXPERTS, WIDTH, INNER)


def naive(x: Tensor, index: Tensor, scale: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token in range(len(x)):
        row = torch.zeros(WIDTH, dtype=x.dtype)
        for choice, expert in enumerate(index[token].tolist()):
            if expert < EXPERTS:
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                row = row + scale[token, choice] * (down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def stacked(weight: Tensor) -> tuple[StackedWeight, Tensor]:
    """The weight with coordinates, and the basis in which their gradient comes."""
    basis_NR = random_basis(weight.shape[2], RANK, torch.Generator().manual_seed(3), weight.detach())

    def absorb(factors: GradientFactors) -> Tensor:
        return factors.left_t_matmul(factors.right_TN @ basis_NR)

    coordinates = torch.zeros(weight.shape[0] * weight.shape[1], RANK, dtype=torch.float64, requires_grad=True)
    return StackedWeight(weight.detach(), coordinates, absorb), basis_NR


def check_gradients(
    x: Tensor, scale: Tensor, first: tuple[StackedWeight, Tensor], second: tuple[StackedWeight, Tensor], exact: Sequence[Tensor]
) -> None:
    """Against those of the tokens, the scales and both weights, of which the coordinates have what lies in their basis."""
    in_bases = [grad.flatten(0, 1) @ basis_NR for grad, (_, basis_NR) in zip(exact[2:], (first, second), strict=True)]
    found = (x.grad, scale.grad, first[0].coordinates_MR.grad, second[0].coordinates_MR.grad)
    for grad, expected in zip(found, (*exact[:2], *in_bases), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_against_naive_code(elsewhere: bool, holder: Callable[..., Holder]) -> None:
    x, index, scale, gate_up, down = inputs()
    if elsewhere:  # a choice that another device answers for
        index[2, 1] = EXPERTS
    wanted = naive(x, index, scale, gate_up, down)
    torch.testing.assert_close(experts_value(x, index, scale, gate_up, down, "silu"), wanted, rtol=0, atol=1e-12)
    exact = torch.autograd.grad(wanted.sin().sum(), [x, scale, gate_up, down])
    (first, first_basis), (second, second_basis) = stacked(gate_up), stacked(down)
    found = subspace_experts(x, index, scale, first, second, "silu", holder())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    found.sin().sum().backward()
    check_gradients(x, scale, (first, first_basis), (second, second_basis), exact)


def test_a_replay_that_sends_tokens_elsewhere(holder: Callable[..., Holder]) -> None:
    """As one from codes may: the gradients are those of the replay's routing, all of them."""
    x, index, scale, gate_up, down = inputs()
    index[:, 0], index[:, 1] = 0, 1
    elsewhere = index.clone()
    elsewhere[3, 0] = 2
    (first, first_basis), (second, second_basis) = stacked(gate_up), stacked(down)
    calls = iter((index, elsewhere))

    def block(x: Tensor) -> Tensor:
        return subspace_experts(x, next(calls), scale, first, second, "silu", holder()) * 1.0

    checkpoint(block, x, use_reentrant=False).sin().sum().backward()
    with torch.no_grad():
        grad = naive(x, index, scale, gate_up, down).cos()
    exact = torch.autograd.grad(naive(x, elsewhere, scale, gate_up, down), [x, scale, gate_up, down], grad)
    check_gradients(x, scale, (first, first_basis), (second, second_basis), exact)


def test_tokens_in_batches_and_a_frozen_part(holder: Callable[..., Holder]) -> None:
    x, index, scale, gate_up, down = inputs()
    (first, _), (second, basis_NR) = stacked(gate_up), stacked(down)
    first.coordinates_MR.requires_grad_(False)
    (exact,) = torch.autograd.grad(naive(x, index, scale, gate_up, down).square().sum(), [down])
    folded = x.detach().view(1, TOKENS, WIDTH)
    found = subspace_experts(folded, index.view(1, TOKENS, CHOICES), scale.detach(), first, second, "silu", holder())
    assert found.shape == folded.shape
    found.square().sum().backward()
    torch.testing.assert_close(second.coordinates_MR.grad, exact.flatten(0, 1) @ basis_NR, rtol=1e-12, atol=1e-11)
    assert first.coordinates_MR.grad is None


def test_tokens_that_nobody_takes_are_zero_and_teach_nothing(holder: Callable[..., Holder]) -> None:
    x, _, scale, gate_up, down = inputs()
    index = torch.full((TOKENS, CHOICES), EXPERTS)
    assert routing_of(index, EXPERTS).counts == (0,) * EXPERTS
    assert not experts_value(x, index, scale, gate_up, down, "silu").any()
    first, second = stacked(gate_up)[0], stacked(down)[0]
    found = subspace_experts(x, index, scale, first, second, "silu", holder())
    assert not found.any()
    found.sum().backward()
    for grad in (x.grad, scale.grad, first.coordinates_MR.grad, second.coordinates_MR.grad):
        assert grad is not None
        assert not grad.any()


@pytest.mark.parametrize("codec", [EXACT, INT8], ids=["exact", "int8"])
def test_what_is_held(codec: Codec, holder: Callable[..., Holder]) -> None:
    """Gate and up of every pair and the input once, whoever else reads it; two numbers a pair; no output of an expert."""
    x, index, scale, gate_up, down = inputs()
    first, second = stacked(gate_up)[0], stacked(down)[0]
    weights = {first.weight_EMN.data_ptr(), second.weight_EMN.data_ptr()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Any:
        if tensor.data_ptr() not in weights:
            held[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subspace_experts(x, index, scale, first, second, "silu", holder(codec))
    pairs = TOKENS * CHOICES
    numbers = 8 * pairs + 8 * pairs + 8 * EXPERTS
    wanted = gated_bytes(codec, pairs, INNER, 8) + codec.nbytes(TOKENS, WIDTH, 8) + numbers
    assert wanted <= sum(held.values()) <= wanted + 8 * pairs  # the choices' places, for the scales' own gradient


def test_scores_in_float32_are_not_rounded(holder: Callable[..., Holder]) -> None:
    """Nor is the sum over a token's experts: 1 + 3/512 is 1 where it is added up in bfloat16, whose steps are 1/128 there."""
    many = 512
    x = torch.randn(many, WIDTH).bfloat16()
    gate_up, down = (torch.randn(1, *shape).bfloat16().expand(4, -1, -1) for shape in ((2 * INNER, WIDTH), (WIDTH, INNER)))
    index = torch.arange(4).expand(many, 4)
    one, more = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, *[1 / 512] * 3])
    alone, summed = (experts_value(x, index, scale.expand(many, 4), gate_up, down, "silu") for scale in (one, more))
    assert float(summed.float().norm() / alone.float().norm()) == pytest.approx(1 + 3 / 512, abs=1e-3)

    norms = []
    for scale in (1.0, 1.003):
        first, second = (stacked(weight)[0] for weight in (gate_up, down))
        rows = x.clone().requires_grad_()
        scales = torch.full((many, 1), scale)
        subspace_experts(rows, index[:, :1], scales, first, second, "silu", holder()).backward(alone)
        assert rows.grad is not None
        assert second.coordinates_MR.grad is not None
        norms.append([float(grad.double().norm()) for grad in (rows.grad, second.coordinates_MR.grad)])
    assert [after / before for before, after in zip(*norms, strict=True)] == pytest.approx([1.003, 1.003], abs=1e-3)


def test_autocast_computes_in_the_short_format(holder: Callable[..., Holder]) -> None:
    x, index, scale, gate_up, down = (one.float().detach() if one.is_floating_point() else one for one in inputs())
    x.requires_grad_()
    seen: list[torch.dtype] = []

    def absorb(factors: GradientFactors) -> Tensor:
        seen.append(factors.right_TN.dtype)
        return torch.zeros(factors.left_t_matmul(factors.right_TN).shape[0], RANK)

    def short(weight: Tensor) -> StackedWeight:
        return StackedWeight(weight, torch.zeros(len(weight) * weight.shape[1], RANK, requires_grad=True), absorb)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = subspace_experts(x, index, scale, short(gate_up), short(down), "silu", holder())
    assert found.dtype == torch.float32
    found.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(found, naive(x, index, scale, gate_up, down), rtol=0.05, atol=0.3)
