"""The loss of a frozen head, in tiles of the vocabulary: values and gradients of the plain formula, in bounded memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradlite.errors import GradLiteError
from gradlite.hold import compiled
from gradlite.ops import frozen_head
from gradlite.ops.frozen_head import frozen_head_bytes, frozen_head_cross_entropy, tile_words
from gradlite.ops.loss import LossKind

KINDS = [LossKind(), LossKind(softcap=3.0), LossKind(smoothing=0.1), LossKind(softcap=3.0, smoothing=0.2)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(frozen_head.TILE_ELEMENTS, "cpu", 60)
    monkeypatch.setattr(frozen_head, "_LEAST_TILE", 7)
    monkeypatch.setattr(compiled._State, "usable", True)  # eager tiles are shorter


def inputs(dtype: torch.dtype, tokens: int = 5, vocabulary: int = 43) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    h = torch.randn(tokens, 8).to(dtype).requires_grad_()
    weight, bias = 2 * torch.randn(vocabulary, 8).to(dtype), torch.randn(vocabulary).to(dtype)
    return h, weight, bias, torch.randint(0, vocabulary, (tokens,))


def naive(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kind: LossKind) -> Tensor:
    logits = F.linear(h, weight, bias).to(torch.promote_types(h.dtype, torch.float32))
    if kind.softcap:
        logits = kind.softcap * torch.tanh(logits / kind.softcap)
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=kind.smoothing)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_formula(kind: LossKind, has_bias: bool) -> None:
    h, weight, bias, labels = inputs(torch.float64)
    arguments = h, weight, bias if has_bias else None, labels, kind
    found, wanted = frozen_head_cross_entropy(*arguments), naive(*arguments)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(0.3 * loss, h)[0] for loss in (found, wanted)))


def test_large_logits_do_not_overflow() -> None:
    h, weight, _, labels = inputs(torch.float32)
    arguments = 100.0 * h, 10.0 * weight, None, labels, LossKind()
    torch.testing.assert_close(frozen_head_cross_entropy(*arguments), naive(*arguments))


def test_short_formats_lose_no_digits_in_the_sum_over_tiles() -> None:
    h, weight, _, labels = inputs(torch.bfloat16, tokens=6, vocabulary=400)
    h = h.detach().mul_(0.2).requires_grad_()
    (found,) = torch.autograd.grad(frozen_head_cross_entropy(h, weight, None, labels, LossKind()), h)
    exact = h.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(naive(exact, weight.double(), None, labels, LossKind()), exact)
    (plain,) = torch.autograd.grad(naive(h, weight, None, labels, LossKind()), h)
    assert (found - wanted).norm() <= 1.3 * (plain - wanted).norm() + 4 * torch.finfo(torch.bfloat16).eps * wanted.norm()


def test_holds_the_gradient_of_the_states_alone(held_bytes: object) -> None:
    h, weight, _, labels = inputs(torch.float32)
    held = held_bytes(lambda: frozen_head_cross_entropy(h, weight, None, labels, LossKind()), [weight])  # type: ignore[operator]
    assert held == frozen_head_bytes(5, 8, 4)


def test_tiles_are_even_and_bounded() -> None:
    words = tile_words(6, 101, "cpu")
    assert words == 10
    num_tiles = -(-101 // words)
    assert words * num_tiles - 101 < num_tiles  # or one word less would do
    assert tile_words(1000, 20, "cpu") == 7  # never below the least tile


def test_no_tokens() -> None:
    h, weight, _, labels = inputs(torch.float32)
    loss = frozen_head_cross_entropy(h[:0], weight, None, labels[:0], LossKind())
    assert loss == 0


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    h, weight, _, labels = inputs(torch.float32)
    with pytest.raises(GradLiteError, match=r"\[0, 43\)"):
        frozen_head_cross_entropy(h, weight, None, labels + 43, LossKind())
