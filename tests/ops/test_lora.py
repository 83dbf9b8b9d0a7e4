"""The linear layer with an adapter: gradients in float64, what it keeps, and a whole block by finite differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlite.errors import GradLiteError
from gradlite.hold.codec import EXACT, INT8
from gradlite.hold.holder import Holder
from gradlite.hold.noise import Noise
from gradlite.hold.shelf import Shelf
from gradlite.ops import frozen_weight, token_tiles
from gradlite.ops.attention import attention
from gradlite.ops.frozen_weight import FourBitWeight, four_bit_bytes, four_bit_codes, frozen_linear
from gradlite.ops.gated_mlp import gated, gated_value
from gradlite.ops.linear import linear_bytes
from gradlite.ops.lora import LoraKind, dora_scale, lora_bytes, lora_linear
from gradlite.ops.norm import NormKind, norm
from gradlite.ops.token_tiles import TokenWise, tile_tokens, tiled_over_tokens

T, M, N, R = 6, 5, 8, 3
KINDS = [LoraKind(0.7), LoraKind(0.7, keeps_h=True), LoraKind(0.7, dropout=0.4), LoraKind(0.7, dropout=0.4, keeps_h=True)]


def holder(codec: Any = EXACT) -> Holder:
    return Holder(codec, Noise(0), Shelf())


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, bias, A, B, c; and W, frozen."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, T // 2, N), (M,), (R, N), (M, R), (M,)]
    trained = [torch.randn(*size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]
    return [*trained, torch.randn(M, N, generator=generator, dtype=dtype)]


def plain(kind: LoraKind, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, weight: Tensor) -> Tensor:
    """The formula, for autograd."""
    y = F.linear(x, weight) + F.linear(F.linear(F.dropout(x, kind.dropout), a), b) * kind.scale
    y = y if c is None else c * y
    return y if bias is None else y + bias


@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: LoraKind, has_scale: bool) -> None:
    *trained, weight = inputs()

    def function(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        torch.manual_seed(1)
        return lora_linear(x, weight, bias, a, b, kind, holder(), scale_M=c if has_scale else None)

    assert torch.autograd.gradcheck(function, tuple(trained))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_out", ["nothing", "bias and scale", "x", "a", "b", "all but the bias"])
def test_equals_autograds(left_out: str, kind: LoraKind) -> None:
    x, bias, a, b, c, weight = inputs()
    arguments: list[Tensor | None] = [x, bias, a, b, c]
    if left_out == "bias and scale":
        arguments[1] = arguments[4] = None
    frozen = {"x": [0], "a": [2], "b": [3], "all but the bias": [0, 2, 3, 4]}.get(left_out, [])
    for place in frozen:
        trained = arguments[place]
        assert trained is not None
        trained.requires_grad_(False)
    wanted_for = [one for one in arguments if one is not None and one.requires_grad]
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        if ours:
            y = lora_linear(arguments[0], weight, *arguments[1:4], kind, holder(), scale_M=arguments[4])  # type: ignore[arg-type,misc]
        else:
            y = plain(kind, *arguments, weight)  # type: ignore[arg-type,call-arg]
        upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
        results.append((y.detach(), *torch.autograd.grad(y, wanted_for, upstream)))
    torch.testing.assert_close(*results)


def test_no_gradient_wanted_holds_nothing(held_bytes: Callable[..., int]) -> None:
    x, bias, a, b, c, weight = (one.detach() for one in inputs())
    y = lora_linear(x, weight, bias, a, b, LoraKind(0.7), holder(), scale_M=c)
    torch.testing.assert_close(y, plain(LoraKind(0.7), x, bias, a, b, c, weight))
    assert held_bytes(lambda: lora_linear(x, weight, bias, a, b, LoraKind(0.7), holder())) == 0


@pytest.mark.parametrize("codec", [EXACT, INT8])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind: LoraKind, codec: Any, held_bytes: Callable[..., int]) -> None:
    x, bias, a, b, _, weight = inputs(torch.float32)
    held = held_bytes(lambda: lora_linear(x, weight, bias, a, b, kind, holder(codec)), [a, b, weight, bias])
    assert held == lora_bytes(codec, T, N, 4, R, kind)
    assert lora_bytes(codec, T, N, 4, R, LoraKind(1.0)) == linear_bytes(codec, T, N, 4)


def test_what_a_norm_holds_is_held_once(held_bytes: Callable[..., int]) -> None:
    x, _, a, b, _, weight = inputs(torch.float32)
    one = holder()
    scale = torch.ones(N)

    def work() -> list[Tensor]:
        y = norm(x, scale, None, NormKind(1e-6), one)
        return [lora_linear(y, weight, None, a, b, LoraKind(1.0), one) for _ in range(3)]

    assert held_bytes(work, [a, b, weight, scale]) == T * N * 4 + T * 4


def test_adapters_may_be_wider_than_the_model() -> None:
    x, bias, a, b, _, weight = inputs(torch.float32)
    x, bias, weight = (one.detach().bfloat16() for one in (x, bias, weight))
    x.requires_grad_()
    y = lora_linear(x, weight, bias, a, b, LoraKind(0.7), holder())
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), [x, a, b])
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]
    exact = [one.detach().float().requires_grad_() for one in (x, a, b)]
    wanted = torch.autograd.grad(
        plain(LoraKind(0.7), exact[0], bias.float(), exact[1], exact[2], None, weight.float()).square().sum(), exact
    )
    for grad, one in zip(grads, wanted, strict=True):
        assert (grad - one).norm() <= 0.02 * one.norm()


def test_dora_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms a few rows at a time; differentiable in the magnitude alone."""
    monkeypatch.setattr("gradlite.ops.lora._NORM_ELEMENTS", 2 * N)
    _, _, a, b, c, weight = inputs()
    scale = dora_scale(weight, a, b, c, 0.7)
    norms = (weight + 0.7 * b @ a).norm(dim=1).detach()
    torch.testing.assert_close(scale, c / norms)
    (grad,) = torch.autograd.grad(scale.sum(), c)
    torch.testing.assert_close(grad, 1.0 / norms)
    assert not torch.autograd.grad(dora_scale(weight, a, b, c, 0.7).sum(), [a, c], allow_unused=True)[0]


# ---- four bits ------------------------------------------------------------------------------------------------------


def test_four_bit_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(frozen_weight.TILE_ELEMENTS, "cpu", 3 * 128)
    torch.manual_seed(0)
    dense, x, grad = torch.randn(10, 128), torch.randn(4, 128), torch.randn(4, 10)
    codes, scales = four_bit_codes(dense)
    assert codes.nbytes + scales.nbytes == four_bit_bytes(10, 128)
    weight = FourBitWeight(codes, scales)
    rounded = weight.rows(slice(None), torch.float32)
    steps = dense.view(10, 2, 64).abs().amax(-1, keepdim=True) / 7
    assert ((rounded - dense).view(10, 2, 64).abs() <= 0.52 * steps).all()  # to nearest
    torch.testing.assert_close(weight.times(x, None), x @ rounded.T)
    torch.testing.assert_close(weight.transposed_times(grad), grad @ rounded)
    x.requires_grad_()
    bias = torch.randn(10, requires_grad=True)
    found = torch.autograd.grad(frozen_linear(x, weight, bias), [x, bias], grad)
    torch.testing.assert_close(found, torch.autograd.grad(F.linear(x, rounded, bias), [x, bias], grad))


def test_a_decoded_weight_never_exists_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(frozen_weight.TILE_ELEMENTS, "cpu", 3 * 128)
    sizes: list[int] = []
    own = FourBitWeight.rows

    def watched(weight: FourBitWeight, tile: slice, dtype: torch.dtype) -> Tensor:
        rows = own(weight, tile, dtype)
        sizes.append(rows.numel())
        return rows

    monkeypatch.setattr(FourBitWeight, "rows", watched)
    x, a, b = torch.randn(4, 128, requires_grad=True), torch.randn(R, 128, requires_grad=True), torch.randn(10, R)
    y = lora_linear(x, FourBitWeight(*four_bit_codes(torch.randn(10, 128))), None, a, b, LoraKind(1.0), holder())
    y.sum().backward()
    assert len(sizes) == 8
    assert max(sizes) <= 3 * 128


def test_odd_widths_are_refused() -> None:
    with pytest.raises(GradLiteError, match="10×33"):
        four_bit_codes(torch.zeros(10, 33))


# ---- a few tokens at a time -----------------------------------------------------------------------------------------


def mlp(x: Tensor, weights: list[Tensor]) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, weights[0])), weights[1])


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_token_tiles(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_tiles.TILE_TOKENS, "cpu", tile)
    torch.manual_seed(0)
    weights = [torch.randn(9, N, dtype=torch.float64, requires_grad=True), torch.randn(N, 9, dtype=torch.float64)]
    x = torch.randn(2, 5, N, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        part = TokenWise(lambda x: mlp(x, weights), lambda x: mlp(x, weights), [weight])
        return tiled_over_tokens(x, part, holder())

    assert torch.autograd.gradcheck(function, (x, weights[0]))
    torch.testing.assert_close(function(x, weights[0]), mlp(x, weights))
    torch.testing.assert_close(function(x[:0], weights[0]), mlp(x[:0], weights))


def test_token_tiles_repeat_random_numbers() -> None:
    x = torch.randn(7, N, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(N, N, dtype=torch.float64, requires_grad=True)

    def dropped(x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, weight), 0.5)

    grads = []
    for function in (dropped, lambda x: tiled_over_tokens(x, TokenWise(dropped, dropped, [weight], True), holder())):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(function(x).square().sum(), [x, weight]))
    torch.testing.assert_close(*grads)
    assert tile_tokens(1000, TokenWise(dropped, dropped, [], True), "cpu") == 1000


# ---- a whole block --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """RMSNorm, attention with grouped keys and rotary embedding, gated MLP; seven adapters."""

    HEADS, GROUPS, WIDTH, HIDDEN = 4, 2, 16, 20

    def __init__(self) -> None:
        super().__init__()
        head = self.WIDTH // self.HEADS
        shapes = {"q": (self.WIDTH, self.WIDTH), "k": (self.GROUPS * head, self.WIDTH), "v": (self.GROUPS * head, self.WIDTH)}
        shapes |= {"o": (self.WIDTH, self.WIDTH), "gate": (self.HIDDEN, self.WIDTH), "up": (self.HIDDEN, self.WIDTH)}
        shapes |= {"down": (self.WIDTH, self.HIDDEN)}
        for name, (rows, width) in shapes.items():
            self.register_buffer(name, torch.randn(rows, width).double() / width**0.5)
            self.register_parameter(f"{name}_a", nn.Parameter(torch.randn(2, width).double() / 4))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.randn(rows, 2).double() / 2))
        self.register_buffer("scales", 1.0 + 0.1 * torch.randn(2, self.WIDTH).double())

    def layer(self, name: str, x: Tensor, one: Holder) -> Tensor:
        a, b = self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b")
        return lora_linear(x, self.get_buffer(name), None, a, b, LoraKind(1.5), one)

    def mlp(self, x: Tensor, one: Holder, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return self.layer("down", product(self.layer("gate", x, one), self.layer("up", x, one)), one)

    def forward(self, x: Tensor) -> Tensor:
        one, scales = holder(), self.get_buffer("scales")
        y = norm(x, scales[0], None, NormKind(1e-6), one)
        q, k, v = (self.layer(name, y, one).unflatten(-1, (-1, self.WIDTH // self.HEADS)).transpose(1, 2) for name in "qkv")
        q, k = rotated(q), rotated(k)
        out = attention(q, k, v, None, True, 0.5, one)
        x = x + self.layer("o", out.flatten(2), one)
        part = TokenWise(
            lambda y: self.mlp(y, one, lambda gate, up: gated_value("silu", gate, up)),
            lambda y: self.mlp(y, one, lambda gate, up: gated(gate, up, "silu", one)),
            [p for name, p in self.named_parameters() if name.startswith(("gate", "up", "down"))],
        )
        return x + tiled_over_tokens(norm(x, scales[1], None, NormKind(1e-6), one), part, one)


def rotated(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 0.5 ** torch.arange(width)[None, :].double()
    first, second = x.chunk(2, -1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def test_a_whole_block_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_tiles.TILE_TOKENS, "cpu", 3)
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(2, 4, Block.WIDTH).double().requires_grad_()
    upstream = torch.randn(2, 4, Block.WIDTH).double()
    trained = {"x": x, **dict(block.named_parameters())}
    assert len(trained) == 15
    grads = torch.autograd.grad((block(x) * upstream).sum(), list(trained.values()))
    for (name, one), grad in zip(trained.items(), grads, strict=True):
        for direction in torch.randn(2, *one.shape, generator=torch.Generator().manual_seed(1)).double():
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    one.add_(direction, alpha=step)
                    values.append(float((block(x) * upstream).sum()))
                    one.sub_(direction, alpha=step)
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(float((grad * direction).sum()), rel=1e-6, abs=1e-7), name
