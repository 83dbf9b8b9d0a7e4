"""The share of a gradient's energy inside the basis: right within its stated variance, and without a trace in training."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradlite
from gradlite.attaching import attachment_of
from gradlite.ops.factors import DenseFactors, GradientFactors, LookupFactors
from gradlite.optim import subspace_adamw
from gradlite.subspace.basis import random_basis
from gradlite.subspace.energy import NUM_PROBES, outside_probes, probed, share_inside

Build = Callable[..., nn.Module]
Batches = Callable[..., list[Tensor]]

T, M, N, R = 40, 18, 24, 6


def gradient(kind: str) -> tuple[GradientFactors, Tensor, Tensor]:
    """Factors, a basis, and the exact gradient."""
    generator = torch.Generator().manual_seed(3)
    right = torch.randn(T, N, generator=generator, dtype=torch.float64)
    basis = random_basis(N, R, generator, right)
    if kind == "look-up":
        ids = torch.randint(0, M, (T,), generator=generator)
        return LookupFactors(ids, right, M), basis, torch.nn.functional.one_hot(ids, M).double().T @ right
    left = torch.randn(T, M, generator=generator, dtype=torch.float64)
    if kind == "one direction":  # the residual with the largest variance of all
        right = right @ basis @ basis.T + torch.ones(T, 1, dtype=torch.float64) * (right[:1] - right[:1] @ basis @ basis.T)
    return DenseFactors(left, right), basis, left.T @ right


@pytest.mark.parametrize("kind", ["dense", "look-up", "one direction"])
def test_the_residuals_energy_has_no_bias_and_the_stated_variance(kind: str) -> None:
    factors, basis, exact = gradient(kind)
    residual = exact - exact @ basis @ basis.T
    draws = 2000
    estimates = torch.stack(
        [probed(factors, exact @ basis, outside_probes(basis, seed))[:, :-1].square().sum() for seed in range(draws)]
    )
    estimates /= NUM_PROBES
    deviation = (2 / NUM_PROBES * torch.linalg.svdvals(residual).pow(4).sum()).sqrt()
    assert abs(estimates.mean() - residual.square().sum()) < 4 * deviation / draws**0.5
    assert estimates.std() == pytest.approx(float(deviation), rel=0.15)  # chi-squared: its own spread is about 5 %


@pytest.mark.parametrize("kind", ["dense", "look-up", "one direction"])
def test_the_share_lies_within_its_stated_deviation(kind: str) -> None:
    factors, basis, exact = gradient(kind)
    inside = exact @ basis
    residual = exact - inside @ basis.T
    share = float(inside.square().sum() / exact.square().sum())
    spread = (2 / NUM_PROBES * torch.linalg.svdvals(residual).pow(4).sum()).sqrt() / residual.square().sum()
    estimates = torch.stack([share_inside(inside, probed(factors, inside, outside_probes(basis, s))) for s in range(200)])
    assert estimates.std() < 1.5 * share * (1 - share) * spread + 1e-9
    assert abs(estimates.mean() - share) < share * (1 - share) * (4 * spread / 200**0.5 + 1.5 * spread**2)  # a ratio's own bias


def test_probes_leave_the_basis_out() -> None:
    _, basis, exact = gradient("dense")
    probes = outside_probes(basis, 1)
    assert probes.shape == (N, NUM_PROBES)
    assert (basis.T @ probes).abs().max() < 1e-12
    assert share_inside(exact, torch.cat((torch.zeros(M, NUM_PROBES), exact[:, :1]), 1)) == 1.0


def test_a_scaled_gradient_has_the_same_share() -> None:
    factors, basis, exact = gradient("dense")
    seen = probed(factors, exact @ basis, outside_probes(basis, 1))
    assert share_inside(0.01 * exact @ basis, seen) == pytest.approx(float(share_inside(exact @ basis, seen)), rel=1e-12)


def train(model: nn.Module, batches: list[Tensor], pieces: int = 1, **settings: Any) -> gradlite.GradLite:
    optimizer = gradlite.GradLite(model, lr=1e-3, refresh_interval=1, **{"rank": 6, **settings})
    for step, ids in enumerate(batches):
        for part in ids.chunk(1 if step == 0 else pieces):
            (model(part) / (1 if step == 0 else pieces)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def exact_shares(model: nn.Module, ids: Tensor, optimizer: gradlite.GradLite, build: Build) -> dict[str, float]:
    """From an exact backward pass of a plain model with the same weights, and the attached model's bases."""
    plain = build()
    plain.load_state_dict(model.state_dict())
    plain(ids).backward()
    attachment = attachment_of(model)
    assert attachment is not None
    found: dict[str, float] = {}
    for (name, _), collector in zip(attachment.projected, attachment.window.collectors, strict=True):
        gradient_MN, basis_NR = plain.get_parameter(name).grad, collector.basis.matrix_NR
        assert gradient_MN is not None
        assert basis_NR is not None
        found[name] = float((gradient_MN @ basis_NR).square().sum() / gradient_MN.square().sum())
    return found


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_models_shares_are_those_of_exact_gradients(
    pieces: int, tiny_model: Build, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also of the tied table with its two uses, through clipping, and over the micro-batches of one step.
    monkeypatch.setattr(subspace_adamw, "outside_probes", lambda basis, seed: outside_probes(basis, seed, 4000))
    model = tiny_model()
    *first, last = batches(5)
    optimizer = train(model, first)
    exact = exact_shares(model, last, optimizer, tiny_model)
    due = [c.basis.probes_NK is not None for c in attachment_of(model).window.collectors]  # type: ignore[union-attr]
    for part in last.chunk(pieces):
        (model(part) / pieces).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    shares = optimizer.energy()
    assert shares.keys() == exact.keys()
    measured = [name for name, now in zip(exact, due, strict=True) if now]
    assert len(measured) >= 3
    for name in measured:
        assert shares[name] == pytest.approx(exact[name], abs=0.25 * (2 / 4000) ** 0.5 * 4), name


def test_shares_are_kept_until_measured_again_and_every_basis_has_its_turn(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    optimizer = gradlite.GradLite(model, rank=6, refresh_interval=1)
    seen = [optimizer.energy()]
    for ids in batches(4):
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(optimizer.energy())
    assert seen[0] == seen[1] == {}  # the first basis is made of the first gradient itself: that share would say nothing
    assert 0 < len(seen[2]) < len(seen[3]) == len(optimizer._attachment.projected)
    again = {name for name in seen[3] if seen[3][name] != seen[4][name]}
    assert again == seen[2].keys()
    assert all(0.0 <= share <= 1.0 for share in seen[4].values())


def test_a_gradient_of_zero_has_no_share(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    optimizer = train(model, batches(3))
    names = set(optimizer.energy())
    for ids in batches(2):
        (model(ids) * 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert names
    assert optimizer.energy() == {}


@pytest.mark.parametrize("settings", [{}, {"feedback": "feedback"}, {"basis": "activation"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_the_same_to_the_bit_without_the_measurement(
    settings: dict[str, Any], dtype: torch.dtype, tiny_model: Build, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = tiny_model(dtype)
    optimizer = train(measured, batches(6), **settings)
    assert optimizer.energy()
    monkeypatch.setattr(subspace_adamw, "REFRESHES_A_MEASUREMENT", 10**6)  # never
    plain = tiny_model(dtype)
    without = train(plain, batches(6), **settings)
    assert without.energy() == {}
    assert torch.equal(optimizer._window.generator.get_state(), without._window.generator.get_state())
    for (name, one), other in zip(measured.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_resumed_optimizer_measures_as_if_never_stopped(tiny_model: Build, batches: Batches) -> None:
    straight = train(tiny_model(), batches(6))
    model = tiny_model()
    begun = train(model, batches(6)[:3])
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed = gradlite.GradLite(model, lr=1e-3, rank=6, refresh_interval=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.energy() == begun.energy()
    for ids in batches(6)[3:]:
        model(ids).backward()
        resumed.step()
        resumed.zero_grad()
    assert resumed.energy() == straight.energy()


def test_measuring_is_counted_in_bytes_and_gone_with_the_window(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    optimizer = train(model, batches(2))
    model(batches(1)[0]).backward()
    bases = optimizer.state_bytes()["basis"]
    collectors = attachment_of(model).window.collectors  # type: ignore[union-attr]
    seen = sum(c.probed_ML.nbytes for c in collectors if c.probed_ML is not None)
    assert seen > 0
    optimizer.zero_grad()
    sketches = sum(b.sketch_NR.nbytes for b in optimizer._window.bases() if b.sketch_NR is not None)
    assert sketches == 0
    assert all(c.probed_ML is None for c in collectors)
    assert optimizer.state_bytes()["basis"] <= bases - seen
