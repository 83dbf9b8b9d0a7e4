"""``C.grad = G P`` and exact input and bias gradients, against ordinary autograd in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gradlite.hold.codec import EXACT
from gradlite.hold.holder import Holder
from gradlite.hold.noise import Noise
from gradlite.hold.shelf import Shelf
from gradlite.ops.embedding import subspace_embedding
from gradlite.ops.experts import ExpertFactors
from gradlite.ops.factors import DenseFactors, GradientFactors, LookupFactors
from gradlite.ops.linear import Absorb, subspace_linear
from gradlite.subspace.basis import random_basis

ROWS, WIDTH, RANK = 20, 12, 5
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}


def basis() -> Tensor:
    return random_basis(WIDTH, RANK, torch.Generator().manual_seed(3), torch.zeros((), dtype=torch.float64))


def holder() -> Holder:
    return Holder(EXACT, Noise(0), Shelf())


def project(basis_NR: Tensor) -> Absorb:
    return lambda factors: factors.left_t_matmul(factors.right_TN @ basis_NR)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def weight_and_coordinates() -> tuple[Tensor, Tensor]:
    return leaf(ROWS, WIDTH), torch.zeros(ROWS, RANK, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize("shape", [(WIDTH,), (7, WIDTH), (2, 3, WIDTH), (2, 3, 2, WIDTH), (0, WIDTH)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(shape: tuple[int, ...], with_bias: bool) -> None:
    x, bias = leaf(*shape), leaf(ROWS) if with_bias else None
    weight, coordinates = weight_and_coordinates()
    leaves = [x, weight] + ([bias] if bias is not None else [])
    probe = torch.randn(*shape[:-1], ROWS, dtype=torch.float64)
    exact_output = F.linear(x, weight, bias)
    exact = torch.autograd.grad((exact_output.sin() * probe).sum(), leaves)
    output = subspace_linear(x, weight, bias, coordinates, project(basis()), holder())
    torch.testing.assert_close(output, exact_output, rtol=0, atol=1e-12)
    (output.sin() * probe).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(coordinates.grad, exact[1] @ basis(), **CLOSE)
    torch.testing.assert_close(x.grad, exact[0], **CLOSE)
    if bias is not None:
        torch.testing.assert_close(bias.grad, exact[2], **CLOSE)


def test_linear_on_a_transposed_input_and_expanded_gradient() -> None:
    x, (weight, coordinates) = leaf(WIDTH, 4, 3), weight_and_coordinates()
    (exact,) = torch.autograd.grad(F.linear(x.transpose(0, 2), weight).sum(), [weight])
    subspace_linear(x.transpose(0, 2), weight, None, coordinates, project(basis()), holder()).sum().backward()
    torch.testing.assert_close(coordinates.grad, exact @ basis(), **CLOSE)


def test_shared_input_and_two_uses_of_one_weight_add_up() -> None:
    x, (weight, coordinates) = leaf(6, WIDTH), weight_and_coordinates()
    other, other_coordinates = weight_and_coordinates()

    def outputs(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
        return (first(x) * second(x)).sum() + first(x.tanh()).square().sum()

    exact = torch.autograd.grad(outputs(lambda t: F.linear(t, weight), lambda t: F.linear(t, other)), [x, weight, other])
    outputs(
        lambda t: subspace_linear(t, weight, None, coordinates, project(basis()), holder()),
        lambda t: subspace_linear(t, other, None, other_coordinates, project(basis()), holder()),
    ).backward()
    for grad, wanted in zip((x.grad, coordinates.grad, other_coordinates.grad), exact, strict=True):
        torch.testing.assert_close(grad, wanted if wanted is exact[0] else wanted @ basis(), **CLOSE)


@pytest.mark.parametrize("shape", [(9,), (3, 4), (2, 2, 2)])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None) -> None:
    ids = torch.randint(0, 6, shape)  # ids repeat, and 2 is among them
    ids.view(-1)[:2] = torch.tensor([2, 3])
    weight, coordinates = weight_and_coordinates()
    exact_output = F.embedding(ids, weight, padding_idx)
    (exact,) = torch.autograd.grad(exact_output.sin().sum(), [weight])
    output = subspace_embedding(ids, weight, coordinates, padding_idx, project(basis()))
    torch.testing.assert_close(output, exact_output, rtol=0, atol=0)
    output.sin().sum().backward()
    assert coordinates.grad is not None
    torch.testing.assert_close(coordinates.grad, exact @ basis(), **CLOSE)
    assert (coordinates.grad[2] == 0).all() == (padding_idx == 2)


def test_tied_embedding_and_head_share_coordinates() -> None:
    ids, (weight, coordinates) = torch.randint(0, ROWS, (3, 5)), weight_and_coordinates()
    (exact,) = torch.autograd.grad(F.linear(F.embedding(ids, weight).tanh(), weight).square().sum(), [weight])
    hidden = subspace_embedding(ids, weight, coordinates, None, project(basis())).tanh()
    subspace_linear(hidden, weight, None, coordinates, project(basis()), holder()).square().sum().backward()
    torch.testing.assert_close(coordinates.grad, exact @ basis(), **CLOSE)


@pytest.mark.parametrize("frozen", ["input", "coordinates"])
def test_nothing_is_computed_that_nobody_asked_for(frozen: str) -> None:
    x, (weight, coordinates) = leaf(4, WIDTH), weight_and_coordinates()
    (x if frozen == "input" else coordinates).requires_grad_(False)
    calls: list[GradientFactors] = []

    def absorb(factors: GradientFactors) -> Tensor:
        calls.append(factors)
        return project(basis())(factors)

    output = subspace_linear(x, weight.detach(), None, coordinates, absorb, holder()).sum()
    with FlopCounterMode(display=False) as counter:
        output.backward()
    assert (x.grad is None) == (frozen == "input")
    assert len(calls) == (0 if frozen == "coordinates" else 1)
    wanted = 4 * ROWS * WIDTH if frozen == "coordinates" else 4 * RANK * (ROWS + WIDTH)
    assert counter.get_total_flops() == 2 * wanted


def test_autocast_keeps_the_low_precision_copy_and_returns_gradients_in_the_leaves_formats() -> None:
    x = torch.randn(6, WIDTH, requires_grad=True)
    weight, coordinates = torch.randn(ROWS, WIDTH), torch.zeros(ROWS, RANK, requires_grad=True)
    seen: list[torch.dtype] = []

    def absorb(factors: GradientFactors) -> Tensor:
        seen.append(factors.right_TN.dtype)
        return project(basis().bfloat16())(factors).to(coordinates.dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = subspace_linear(x, weight, None, coordinates, absorb, holder())
        torch.testing.assert_close(output, F.linear(x, weight), rtol=0, atol=0)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert seen == [torch.bfloat16]
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone_as_pytorch_does() -> None:
    x, (weight, coordinates) = leaf(4, WIDTH), weight_and_coordinates()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = subspace_linear(x, weight, None, coordinates, project(basis()), holder())
        torch.testing.assert_close(output, F.linear(x, weight), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dense", "look-up", "experts"])
def test_factors_agree_with_the_matrix_they_stand_for(kind: str) -> None:
    right = torch.randn(9, WIDTH, dtype=torch.float64)
    ids = torch.randint(0, ROWS, (9,))
    left = torch.randn(9, ROWS, dtype=torch.float64) if kind == "dense" else F.one_hot(ids, ROWS).double()
    factors: GradientFactors = DenseFactors(left, right) if kind == "dense" else LookupFactors(ids, right, ROWS)
    if kind == "experts":  # five of four rows each; the first and the fourth have no pairs
        rows_PM = torch.randn(9, 4, dtype=torch.float64)
        factors, left = ExpertFactors(rows_PM, right, (0, 3, 4, 0, 2)), torch.zeros(9, 5, 4, dtype=torch.float64)
        for pair, expert in enumerate((1, 1, 1, 2, 2, 2, 2, 4, 4)):
            left[pair, expert] = rows_PM[pair]
        left = left.flatten(1)
    z, probe, rows = (
        torch.randn(9, 4, dtype=torch.float64),
        torch.randn(ROWS, 4, dtype=torch.float64),
        torch.tensor([3, 3, 0]),
    )
    torch.testing.assert_close(factors.left_t_matmul(z), left.T @ z, **CLOSE)
    torch.testing.assert_close(factors.left_matmul(probe), left @ probe, **CLOSE)
    torch.testing.assert_close(factors.left_norms(), left.norm(dim=1), **CLOSE)
    torch.testing.assert_close(factors.left_rows(rows), left[rows], **CLOSE)


def test_a_whole_models_gradients(tiny_model: Callable[..., nn.Module], batches: Callable[..., list[Tensor]]) -> None:
    import gradlite
    from gradlite.attaching import attachment_of

    model, plain = tiny_model(), tiny_model()
    gradlite.attach(model, rank=5)
    attachment = attachment_of(model)
    assert attachment is not None
    (ids,) = batches(1)
    model(ids).backward()
    plain(ids).backward()
    for (name, _), collector in zip(attachment.projected, attachment.window.collectors, strict=True):
        exact, matrix = plain.get_parameter(name).grad, collector.basis.matrix_NR
        assert exact is not None
        assert matrix is not None
        torch.testing.assert_close(collector.coordinates.grad, exact @ matrix, **CLOSE)
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(5, dtype=torch.float64), **CLOSE)
    plain_names = {entry.name for entry in attachment.coverage.entries if entry.kind == "plain"}
    assert len(plain_names) == 8
    for name in plain_names:  # norms and biases at every depth: exact only if input gradients are
        torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad, **CLOSE)
