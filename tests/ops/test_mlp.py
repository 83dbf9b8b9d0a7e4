"""Activations and the middle of gated MLPs against autograd in float64, and what they hold."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradlite.hold.codec import EXACT, INT8, Codec
from gradlite.ops.activation import ActivationKind, activation
from gradlite.ops.gated_mlp import gated, gated_bytes
from gradlite.ops.linear import subspace_linear

KINDS: tuple[ActivationKind, ...] = get_args(ActivationKind)
NAIVE: dict[ActivationKind, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu,
}  # fmt: skip


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).mul_(2.0).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 36), (2, 3, 24), (24,), (0, 24)])
def test_activation(kind: ActivationKind, shape: tuple[int, ...], same: Any, holder: Any) -> None:
    same(lambda x: activation(x, kind, holder()), NAIVE[kind], [leaf(*shape)])


@pytest.mark.parametrize("kind", KINDS)
def test_activation_in_bfloat16_is_pytorchs_own(kind: ActivationKind, holder: Any) -> None:
    x = leaf(6, 64, dtype=torch.bfloat16)
    y = activation(x, kind, holder())
    torch.testing.assert_close(y, NAIVE[kind](x), rtol=2**-7, atol=1e-6)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 36), (2, 3, 24)])
def test_gated(kind: ActivationKind, shape: tuple[int, ...], same: Any, holder: Any) -> None:
    same(
        lambda gate, up: gated(gate, up, kind, holder()), lambda gate, up: NAIVE[kind](gate) * up, [leaf(*shape), leaf(*shape)]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_gated_halves_of_one_tensor(kind: ActivationKind, frozen: int | None, same: Any, holder: Any) -> None:
    def halves(x: Tensor) -> list[Tensor]:
        return [half.detach() if place == frozen else half for place, half in enumerate(x.chunk(2, -1))]

    same(
        lambda x: gated(*halves(x), kind, holder()),  # type: ignore[call-arg, arg-type]
        lambda x: NAIVE[kind](halves(x)[0]) * halves(x)[1],
        [leaf(2, 3, 48)],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_int8(kind: ActivationKind, close: Any, holder: Any) -> None:
    least = 0.99 if kind == "relu" else 0.999  # its derivative jumps, and codes round what is close to zero to either side
    close(lambda x: activation(x, kind, holder(INT8)), NAIVE[kind], [leaf(40, 128)], least)
    close(
        lambda gate, up: gated(gate, up, kind, holder(INT8)),
        lambda gate, up: NAIVE[kind](gate) * up,
        [leaf(40, 128), leaf(40, 128)],
        least,
    )


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_activation_bytes(dtype: torch.dtype, codec: Codec, held_bytes: Any, holder: Any) -> None:
    x = leaf(20, 96, dtype=dtype)
    assert held_bytes(lambda: activation(x, "gelu", holder(codec))) == codec.nbytes(20, 96, x.element_size())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gated_bytes(dtype: torch.dtype, fused: bool, codec: Codec, held_bytes: Any, holder: Any) -> None:
    both = leaf(20, 192, dtype=dtype)
    gate, up = both.chunk(2, -1) if fused else (leaf(20, 96, dtype=dtype), leaf(20, 96, dtype=dtype))
    assert held_bytes(lambda: gated(gate, up, "silu", holder(codec))) == gated_bytes(codec, 20, 96, both.element_size())


@pytest.mark.parametrize("operator", ["gated", "activation"])
def test_the_down_projection_reads_what_is_held(operator: str, codec: Codec, held_bytes: Any, holder: Any) -> None:
    """Nothing is held beside gate and up (or the activation's input); exact holding gives the exact gradient."""
    one, gate, up = holder(codec), leaf(2, 10, 96), leaf(2, 10, 96)
    matrix, coordinates = leaf(48, 96), torch.zeros(48, 96, dtype=torch.float64, requires_grad=True)
    outputs: list[Tensor] = []

    def work() -> list[Tensor]:
        h = gated(gate, up, "silu", one) if operator == "gated" else activation(gate, "silu", one)
        outputs.append(subspace_linear(h, matrix, None, coordinates, lambda f: f.left_t_matmul(f.right_TN), one))
        return outputs

    held = held_bytes(work, [matrix, coordinates])
    assert held == (gated_bytes(codec, 20, 96, 8) if operator == "gated" else codec.nbytes(20, 96, 8))
    outputs[0].sin().sum().backward()
    exact = F.linear(F.silu(gate) * (up if operator == "gated" else 1.0), matrix).sin().sum()
    (wanted,) = torch.autograd.grad(exact, [matrix])
    if codec is EXACT:
        torch.testing.assert_close(coordinates.grad, wanted, rtol=0, atol=1e-10)
    assert coordinates.grad is not None
    least = {"exact": 1 - 1e-12, "int8": 0.999, "int4": 0.9}[codec.name]
    assert torch.cosine_similarity(coordinates.grad.flatten(), wanted.flatten(), dim=0) > least


def test_under_no_grad_nothing_is_held_or_offered(holder: Any, held_bytes: Any) -> None:
    one, gate, up = holder(INT8), leaf(5, 24), leaf(5, 24)
    for work in (lambda: gated(gate, up, "silu", one), lambda: activation(gate, "silu", one)):
        with torch.no_grad():
            assert held_bytes(work) == 0
            assert one.shelf.find(work()) is None
    assert one.noise.reads == 0
