"""The tiled vocabulary loss against full logits in float64: values, every gradient, and what the residual's sample sees."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradlite.hold import compiled
from gradlite.ops import loss as module
from gradlite.ops.factors import DenseFactors
from gradlite.ops.loss import LossKind, loss_bytes, tile_tokens, tiled_cross_entropy
from gradlite.subspace.collector import BasisKind, Collector, Window

TOKENS, WIDTH, VOCABULARY, RANK = 11, 24, 37, 5
KINDS = {
    "plain": LossKind(),
    "soft cap": LossKind(softcap=3.0),
    "smoothing": LossKind(smoothing=0.1),
    "both": LossKind(softcap=3.0, smoothing=0.2),
}


@pytest.fixture(params=[1, 3, 100])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a tile; 11 tokens make 11, 4 or one tile."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", int(request.param) * VOCABULARY)
    return int(request.param)


@pytest.fixture(params=[True, False], ids=["compiled path", "eager path"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled._State, "usable", request.param)
    monkeypatch.setattr(module, "_EAGER_ELEMENTS", 2 * VOCABULARY)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def labels() -> Tensor:
    return torch.randint(0, VOCABULARY, (TOKENS,))


def naive(kind: LossKind, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    logits = F.linear(h, weight, bias)
    if kind.softcap:
        logits = kind.softcap * torch.tanh(logits / kind.softcap)
    return F.cross_entropy(logits, target, reduction="sum", label_smoothing=kind.smoothing)


def collector(rank: int = RANK, count: int = 100, kind: BasisKind = "random", seed: int = 0) -> Collector:
    like = torch.zeros((), dtype=torch.float64)
    return Collector(Window(kind, True, seed, like), VOCABULARY, WIDTH, rank, count, like)


@pytest.mark.usefixtures("tile", "_path")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(name: str, with_bias: bool) -> None:
    """Of a head that is trained plain; the loss is scaled, as by a mean or by accumulation."""
    kind, target = KINDS[name], labels()
    inputs = [leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH), *([leaf(VOCABULARY)] if with_bias else [])]
    h, weight, bias = (*inputs, None)[:3]
    assert h is not None
    assert weight is not None
    found, wanted = tiled_cross_entropy(h, weight, bias, target, kind=kind), naive(kind, h, weight, bias, target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(found * -0.37, inputs)
    for one, exact in zip(gradients, torch.autograd.grad(wanted * -0.37, inputs), strict=True):
        torch.testing.assert_close(one, exact, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("frozen", ["h", "weight", "bias"])
def test_nothing_is_made_that_nobody_asked_for(frozen: str) -> None:
    target = labels()
    inputs = {"h": leaf(TOKENS, WIDTH), "weight": leaf(VOCABULARY, WIDTH), "bias": leaf(VOCABULARY)}
    inputs[frozen].requires_grad_(False)
    h, weight, bias = inputs.values()
    tiled_cross_entropy(h, weight, bias, target).backward()
    assert inputs[frozen].grad is None
    trained = {name: one for name, one in inputs.items() if name != frozen}
    wanted = torch.autograd.grad(naive(LossKind(), h, weight, bias, target), list(trained.values()))
    for one, exact in zip(trained.values(), wanted, strict=True):
        torch.testing.assert_close(one.grad, exact, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sampled", [True, False])
def test_coordinates_and_residual_are_those_of_full_logits(name: str, sampled: bool) -> None:
    """With room for every token the sample is the residual itself, whatever the tiles."""
    kind, target, scale = KINDS[name], labels(), 0.25
    h, weight, bias = leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH), leaf(VOCABULARY)
    tiled, full = collector(), collector()
    for each in (tiled, full):
        each.window.sample_residual = sampled
    inputs = [h, bias, tiled.coordinates]
    total = tiled_cross_entropy(h, weight, bias, target, coordinates_VR=tiled.coordinates, measure=tiled, kind=kind)
    assert tiled.window.residual_norm.grad is None  # nothing counts before backward
    found = torch.autograd.grad(total * scale, inputs)
    exact = torch.autograd.grad(naive(kind, h, weight, bias, target) * scale, [h, bias, weight])
    logits = F.linear(h, weight, bias).detach().requires_grad_()
    torch.autograd.backward(naive(kind, logits, torch.eye(VOCABULARY, dtype=torch.float64), None, target) * scale)
    assert logits.grad is not None
    full(DenseFactors(logits.grad, h.detach()))
    assert tiled.basis.matrix_NR is not None
    torch.testing.assert_close(tiled.basis.matrix_NR, full.basis.matrix_NR)
    for one, wanted in zip(found, (*exact[:2], exact[2] @ tiled.basis.matrix_NR), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(tiled.window.residual_norm.grad, full.window.residual_norm.grad, rtol=0, atol=1e-10)
    if not sampled:
        assert tiled.sample is None
        return
    assert tiled.sample is not None
    assert tiled.diagonal is not None
    residual = exact[2] - exact[2] @ tiled.basis.matrix_NR @ tiled.basis.matrix_NR.T
    torch.testing.assert_close(tiled.sample.left_KM.T @ tiled.sample.right_KN, residual, rtol=0, atol=1e-10)
    torch.testing.assert_close(tiled.diagonal, full.diagonal, rtol=0, atol=1e-10)
    torch.testing.assert_close(tiled.residual_squared()[0], residual.square().sum(), rtol=0, atol=1e-10)
    assert tiled.num_tokens == TOKENS


def test_a_thinned_sample_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens of eleven, thinned tile by tile: the mean of many draws is the residual."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", 3 * VOCABULARY)
    h, weight, target = leaf(TOKENS, WIDTH).detach(), leaf(VOCABULARY, WIDTH), labels()
    (exact,) = torch.autograd.grad(naive(LossKind(), h, weight, None, target), [weight])
    one = collector(count=4)
    draws, mean, spread = 500, torch.zeros_like(exact), 0.0
    for _ in range(draws):
        tiled_cross_entropy(
            h, weight.detach(), None, target, coordinates_VR=one.coordinates, measure=one, kind=LossKind()
        ).backward()
        assert one.basis.matrix_NR is not None
        assert one.sample is not None
        assert len(one.sample.left_KM) == 4
        residual = exact - exact @ one.basis.matrix_NR @ one.basis.matrix_NR.T
        estimate = one.sample.left_KM.T @ one.sample.right_KN
        mean += estimate / draws
        spread += float((estimate - residual).square().sum()) / draws
        one.window.clear()
        one.coordinates.grad = None
    assert (mean - residual).norm() < 2 * (spread / draws) ** 0.5  # the expected distance is half of that
    assert spread > 0.1 * residual.square().sum()  # or nothing was thinned


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_the_first_basis_comes_from_the_first_tile(kind: BasisKind) -> None:
    one, target = collector(kind=kind), labels()
    h, weight = leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH)
    tiled_cross_entropy(h, weight, None, target, coordinates_VR=one.coordinates, measure=one).backward()
    (exact,) = torch.autograd.grad(naive(LossKind(), h, weight, None, target), [weight])
    assert one.basis.matrix_NR is not None
    torch.testing.assert_close(one.coordinates.grad, exact @ one.basis.matrix_NR, rtol=0, atol=1e-10)
    torch.testing.assert_close(one.basis.matrix_NR.T @ one.basis.matrix_NR, torch.eye(RANK, dtype=torch.float64))


@pytest.mark.usefixtures("tile")
def test_a_due_refresh_gets_its_sketch() -> None:
    one, target, h, weight = collector(), labels(), leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH)
    one.basis.due, one.probe_MR = True, torch.randn(VOCABULARY, RANK, dtype=torch.float64)
    (tiled_cross_entropy(h, weight, None, target, coordinates_VR=one.coordinates, measure=one) * 0.5).backward()
    (exact,) = torch.autograd.grad(naive(LossKind(), h, weight, None, target) * 0.5, [weight])
    torch.testing.assert_close(one.basis.sketch_NR, exact.T @ one.probe_MR, rtol=0, atol=1e-10)


def test_under_no_grad(held_bytes: Any) -> None:
    one, target, h, weight = collector(), labels(), leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH)

    def work() -> Tensor:
        return tiled_cross_entropy(h, weight, None, target, coordinates_VR=one.coordinates, measure=one)

    with torch.no_grad():
        assert held_bytes(work) == 0
        torch.testing.assert_close(work(), naive(LossKind(), h, weight, None, target))
    assert one.basis.matrix_NR is None


def test_no_token_counts() -> None:
    h, weight = leaf(0, WIDTH), leaf(VOCABULARY, WIDTH)
    total = tiled_cross_entropy(h, weight, None, torch.zeros(0, dtype=torch.int64))
    assert total == 0
    total.backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_bfloat16_is_as_good_as_full_logits(scale: float) -> None:
    """Also where logits are far from zero; sums are in float32."""
    target = labels()
    h, weight = (leaf(*shape, dtype=torch.bfloat16) for shape in ((TOKENS, WIDTH), (VOCABULARY, WIDTH)))
    h.data *= scale

    def results(loss: Tensor, inputs: list[Tensor]) -> Tensor:
        return torch.cat([one.double().flatten() for one in (loss, *torch.autograd.grad(loss, inputs))])

    exact = [one.detach().double().requires_grad_() for one in (h, weight)]
    truth = results(naive(LossKind(), exact[0], exact[1], None, target), exact)
    plain = results(F.cross_entropy(F.linear(h, weight).float(), target, reduction="sum"), [h, weight])
    loss = tiled_cross_entropy(h, weight, None, target)
    assert loss.dtype == torch.float32
    assert (results(loss, [h, weight]) - truth).norm() <= 1.05 * (plain - truth).norm()


def test_autocast_is_pytorchs() -> None:
    target, h, weight, bias = labels(), *(leaf(*s, dtype=torch.float32) for s in ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (37,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiled_cross_entropy(h, weight, bias, target)
        wanted = F.cross_entropy(F.linear(h, weight, bias).float(), target, reduction="sum")
    torch.testing.assert_close(found, wanted)
    gradients, exact = (torch.autograd.grad(one, [h, weight, bias]) for one in (found, wanted))
    for one, other in zip(gradients, exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype: torch.dtype, held_bytes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps: the coordinates' gradient is among it."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", 3 * VOCABULARY)
    like = torch.zeros((), dtype=dtype)
    one = Collector(Window("random", False, 0, like), VOCABULARY, WIDTH, RANK, 4, like)
    h, weight, target = leaf(TOKENS, WIDTH, dtype=dtype), torch.randn(VOCABULARY, WIDTH).to(dtype), labels()

    def work() -> Tensor:
        return tiled_cross_entropy(h, weight, None, target, coordinates_VR=one.coordinates, measure=one)

    assert held_bytes(work, [weight]) == loss_bytes(TOKENS, WIDTH, VOCABULARY, RANK, like.element_size())


def test_tokens_of_a_tile() -> None:
    assert [tile_tokens(10_000, 1 << 15, device) for device in ("cpu", "cuda")] == [1 << 8, 1 << 11]
    assert tile_tokens(7, 1 << 15, "cpu") == 7
    assert tile_tokens(7, 1 << 24, "cpu") == 1


def test_sums_over_many_tiles_lose_no_more_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where a running sum of 64 tiles would lose three times as much."""
    torch.manual_seed(0)
    h, weight = torch.randn(128, 32).bfloat16(), torch.randn(50, 32).mul(0.2).bfloat16().requires_grad_()
    labels, errors = torch.randint(0, 50, (128,)), []
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(h.double() @ exact.T, labels, reduction="sum").backward()
    assert exact.grad is not None
    for tokens in (128, 2):
        monkeypatch.setattr("gradlite.ops.loss.tile_tokens", lambda *_, tokens=tokens: tokens)
        (found,) = torch.autograd.grad(tiled_cross_entropy(h, weight, None, labels), [weight])
        errors.append(float((found.double() - exact.grad).norm() / exact.grad.norm()))
    assert errors[1] < 1.3 * errors[0]


def test_so_do_sums_of_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for a head in coordinates and its sketch."""
    torch.manual_seed(0)
    like = torch.zeros((), dtype=torch.bfloat16)
    h, weight = torch.randn(128, 32).bfloat16(), torch.randn(50, 32).mul(0.2).bfloat16()
    target, found = torch.randint(0, 50, (128,)), {}
    for tokens in (128, 2):
        monkeypatch.setattr("gradlite.ops.loss.tile_tokens", lambda *_, tokens=tokens: tokens)
        one = Collector(Window("random", False, 0, like), 50, 32, 8, 4, like)
        one.basis.due, one.probe_MR = True, torch.ones(50, 8).bfloat16()
        tiled_cross_entropy(h, weight.requires_grad_(), None, target, coordinates_VR=one.coordinates, measure=one).backward()
        assert one.coordinates.grad is not None
        assert one.basis.sketch_NR is not None
        assert one.coordinates.grad.dtype == one.basis.sketch_NR.dtype == torch.bfloat16
        found[tokens] = (one.coordinates.grad.double(), one.basis.sketch_NR.double())
    for whole, tiled in zip(*found.values(), strict=True):
        assert float((tiled - whole).norm() / whole.norm()) < 4e-3  # a running sum in bfloat16 is 1e-2 off


def test_nothing_stays_with_a_loss_that_somebody_keeps() -> None:
    one, target, h, weight = collector(), labels(), leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH)
    loss = tiled_cross_entropy(h, weight, None, target, coordinates_VR=one.coordinates, measure=one)
    loss.backward(retain_graph=True)
    assert one.coordinates.grad is not None
    first = one.coordinates.grad.clone()
    loss.backward()
    torch.testing.assert_close(one.coordinates.grad, 2 * first)
    kept = [value for value in vars(loss.grad_fn).values() if isinstance(value, Tensor | tuple)]
    assert kept == []
