"""Norms against autograd of their formula in float64, and what they hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradlite.hold.codec import EXACT, INT8, Codec
from gradlite.ops.linear import linear_bytes, subspace_linear
from gradlite.ops.norm import NormKind, norm, norm_bytes, norm_value

EPS = 1e-5
KINDS = {
    "rms": NormKind(EPS),
    "rms, scaled before rounding": NormKind(EPS, scale_first=True),
    "rms, plus one": NormKind(EPS, plus_one=True),
    "gemma": NormKind(EPS, plus_one=True, scale_first=True),
    "layer norm": NormKind(EPS, centred=True),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).mul_(1.5).add_(0.3).requires_grad_()


def naive(kind: NormKind) -> Callable[..., Tensor]:
    def compute(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if kind.centred:
            return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        y = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        return y if weight is None else y * (weight + 1 if kind.plus_one else weight)

    return compute


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "none"])
@pytest.mark.parametrize("shape", [(5, 36), (2, 3, 24), (24,), (0, 24)])
def test_values_and_gradients(name: str, affine: str, shape: tuple[int, ...], same: Any, holder: Any) -> None:
    kind = KINDS[name]
    weight = None if affine == "none" else leaf(shape[-1])
    bias = leaf(shape[-1]) if affine == "weight and bias" and kind.centred else None
    same(lambda x, weight, bias: norm(x, weight, bias, kind, holder()), naive(kind), [leaf(*shape), weight, bias])


@pytest.mark.parametrize("name", KINDS)
def test_int8(name: str, close: Any, holder: Any) -> None:
    kind = KINDS[name]
    bias = leaf(128) if kind.centred else None
    close(lambda x, weight, bias: norm(x, weight, bias, kind, holder(INT8)), naive(kind), [leaf(40, 128), leaf(128), bias])


@pytest.mark.parametrize("frozen", ["input", "parameters"])
def test_nothing_is_returned_that_nobody_asked_for(frozen: str, same: Any, holder: Any) -> None:
    x, weight, bias = leaf(5, 24), leaf(24), leaf(24)
    for one in [x] if frozen == "input" else [weight, bias]:
        one.requires_grad_(False)
    kind = KINDS["layer norm"]
    same(lambda x, weight, bias: norm(x, weight, bias, kind, holder()), naive(kind), [x, weight, bias])


def test_a_transposed_input(same: Any, holder: Any) -> None:
    kind = KINDS["rms"]
    same(
        lambda x, weight: norm(x.transpose(0, 1), weight, None, kind, holder()),
        lambda x, weight: naive(kind)(x.transpose(0, 1), weight, None),
        [leaf(3, 4, 24), leaf(24)],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_bytes(dtype: torch.dtype, name: str, codec: Codec, held_bytes: Any, holder: Any) -> None:
    x, weight = leaf(20, 96, dtype=dtype), leaf(96, dtype=dtype)
    held = held_bytes(lambda: norm(x, weight, None, KINDS[name], holder(codec)), [weight])
    assert held == norm_bytes(codec, 20, 96, x.element_size())


@pytest.mark.parametrize("name", KINDS)
def test_three_linears_read_what_the_norm_holds(name: str, codec: Codec, held_bytes: Any, holder: Any) -> None:
    """Nothing is held beside the norm's own; with an exact holder their gradients are exact."""
    kind, one = KINDS[name], holder(codec)
    x, weight = leaf(2, 10, 96), leaf(96)
    linears = [(leaf(48, 96), torch.zeros(48, 96, dtype=torch.float64, requires_grad=True)) for _ in range(3)]
    outputs: list[Tensor] = []

    def work() -> list[Tensor]:
        y = norm(x, weight, None, kind, one)
        outputs.extend(
            subspace_linear(y, matrix, None, coordinates, lambda f: f.left_t_matmul(f.right_TN), one)
            for matrix, coordinates in linears
        )
        return outputs

    parameters = [weight, *(matrix for matrix, _ in linears), *(coordinates for _, coordinates in linears)]
    assert held_bytes(work, parameters) == norm_bytes(codec, 20, 96, 8)
    if codec is not EXACT:
        return
    sum(output.sin().sum() for output in outputs).backward()  # type: ignore[union-attr]
    y = naive(kind)(x, weight, None)
    wanted = torch.autograd.grad(
        sum(F.linear(y, matrix).sin().sum() for matrix, _ in linears),  # type: ignore[arg-type]
        [x, weight, *(matrix for matrix, _ in linears)],
    )
    for found, exact in zip([x.grad, weight.grad, *(coordinates.grad for _, coordinates in linears)], wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_a_linear_alone_holds_its_input(codec: Codec, held_bytes: Any, holder: Any) -> None:
    """As codes, also of an input that has a graph; a second linear shares them."""
    x, matrix = leaf(20, 96), leaf(48, 96)
    coordinates, one = torch.zeros(48, 8, dtype=torch.float64, requires_grad=True), holder(codec)
    h = x.mul(1)  # saves nothing itself

    def work() -> list[Tensor]:
        return [subspace_linear(h, matrix, None, coordinates, lambda f: f.left_t_matmul(f.right_TN), one) for _ in range(2)]

    assert held_bytes(work, [matrix, coordinates]) == linear_bytes(codec, 20, 96, 8)


def test_under_no_grad_nothing_is_held_or_offered(holder: Any, held_bytes: Any) -> None:
    one, x, weight = holder(INT8), leaf(5, 24), leaf(24)
    with torch.no_grad():
        assert held_bytes(lambda: norm(x, weight, None, KINDS["rms"], one)) == 0
        y = norm(x, weight, None, KINDS["rms"], one)
    assert one.shelf.find(y) is None
    assert one.noise.reads == 0
    torch.testing.assert_close(y, norm_value(x, weight, None, KINDS["rms"]))
