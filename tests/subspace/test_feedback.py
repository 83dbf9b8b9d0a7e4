"""The error memory: nothing is lost, nothing is counted twice; what truncation and rounding lose is bounded."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import gradlite
from gradlite.attaching import attachment_of
from gradlite.optim.subspace_adamw import MemoryFormat, error_memory
from gradlite.subspace.basis import random_basis
from gradlite.subspace.feedback import FactoredMemory, Int4Memory, memory_rank, truncate_product
from gradlite.subspace.residual import ResidualSample

M, N, R = 40, 32, 16


def randoms(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("fmt", ["factored", "int4", "fp32"])
def test_bytes_are_those_of_the_tensors(fmt: MemoryFormat) -> None:
    memory = error_memory(fmt, torch.Generator)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        like = torch.zeros((), dtype=dtype)
        held = sum(tensor.nbytes for tensor in memory.init(M + 1, N + 1, R, like).values())
        assert held == memory.nbytes(M + 1, N + 1, R, like.itemsize)


@pytest.mark.parametrize("fmt", ["factored", "int4", "fp32"])
def test_applied_plus_remembered_is_what_was_estimated(fmt: MemoryFormat) -> None:
    """50 steps; what a step loses is counted. Exact in float64 for the full memory."""
    generator = torch.Generator().manual_seed(4)
    memory, randn = error_memory(fmt, lambda: generator), randoms()
    state = memory.init(M, N, R, torch.zeros((), dtype=torch.float64))
    estimated, applied = torch.zeros(M, N).double(), torch.zeros(M, N).double()
    lost = torch.zeros(50, dtype=torch.float64)
    left_space, right_space = randn(6, M), randn(6, N)  # residuals have a low-rank part and noise
    for step in range(50):
        sample = ResidualSample(randn(4, 6) @ left_space + 0.3 * randn(4, M), randn(4, 6) @ right_space + 0.3 * randn(4, N))
        term = 0.1 * sample.left_KM.T @ sample.right_KN
        before = memory.dense(state).double().clone()
        memory.add(state, sample, torch.tensor(0.1, dtype=torch.float64))
        after_add = memory.dense(state).double().clone()
        estimated += term
        lost[step] = (before + term - after_add).norm() / (before + term).norm()
        if step % 5 == 4:
            basis = random_basis(N, R, generator, term)
            released = memory.release(state, basis).double() @ basis.T
            applied += released
            inside = memory.dense(state).double() @ basis
            assert inside.norm() < (0.2 if fmt == "int4" else 1e-5) * after_add.norm()  # it left the memory
    gap = (applied + memory.dense(state).double() - estimated).norm() / estimated.norm()
    if fmt == "fp32":
        assert lost.max() < 1e-10
        assert gap < 1e-10
    else:
        bounds = {"int4": (0.02, 0.20, 0.6), "factored": (0.02, 0.95, 1.0)}
        smallest, largest, whole = bounds[fmt]
        assert smallest < lost.mean() < largest
        assert gap < whole


def test_factored_memory_is_exact_while_the_rank_suffices() -> None:
    memory, randn = FactoredMemory(), randoms()
    state = memory.init(M, N, R, torch.zeros((), dtype=torch.float64))
    left, right = randn(memory_rank(R), M), randn(memory_rank(R), N)
    total = torch.zeros(M, N, dtype=torch.float64)
    for _ in range(10):
        sample = ResidualSample(randn(3, len(left)) @ left, randn(3, len(right)) @ right)
        memory.add(state, sample, torch.tensor(2.0, dtype=torch.float64))
        total += 2 * sample.left_KM.T @ sample.right_KN
    # The right rows span only memory_rank dimensions, and so does the sum.
    torch.testing.assert_close(memory.dense(state), total, rtol=1e-7, atol=1e-7)


def test_int4_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, randn = Int4Memory(lambda: generator), randoms()
    sample = ResidualSample(randn(3, M), randn(3, N))
    exact = sample.left_KM.T @ sample.right_KN
    total, square = torch.zeros_like(exact), torch.zeros_like(exact)
    draws = 2000
    for _ in range(draws):
        state = memory.init(M, N, R, exact)
        memory.add(state, sample, torch.tensor(1.0))
        total += memory.dense(state)
        square += memory.dense(state).double().square()
    mean = total / draws
    variance = (square / draws - mean.square()).clamp_min(0.0) / draws
    # The squared error of all 1,280 entries is what unbiased rounding leaves: 1, with a standard error of 0.05.
    assert (mean - exact).square().sum() < 1.15 * variance.sum()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e6, 1e-6), (0.0, 1.0)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_truncation_equals_the_svds(rank: int, scales: tuple[float, float]) -> None:
    randn = randoms()
    left, right = scales[0] * randn(9, M), scales[1] * randn(9, N)
    new_left, new_right = truncate_product(left, right, rank)
    assert new_left.shape == (rank, M)
    assert new_right.shape == (rank, N)
    u, s, vh = torch.linalg.svd(left.T @ right)
    torch.testing.assert_close(new_left.T @ new_right, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=1e-6, atol=1e-7)


def test_truncation_of_dependent_rows_in_float32() -> None:
    randn = randoms()
    left, right = randn(4, M).float().repeat(3, 1), randn(12, N).float()  # rank 4, held in 12 rows
    new_left, new_right = truncate_product(left, right, 4)
    torch.testing.assert_close(new_left.T @ new_right, left.T @ right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("feedback", ["feedback", "same_step"])
def test_weights_receive_the_residual_that_the_memory_does_not_hold(
    feedback: Literal["feedback", "same_step"],
    tiny_model: Callable[..., nn.Module],
    batches: Callable[..., list[Tensor]],
) -> None:
    """In a whole step: weight change = -lr s (direction Pᵀ + φR̂ - what the memory gained), in float64."""
    model = tiny_model()
    optimizer = gradlite.GradLite(
        model, lr=1e-3, rank=4, feedback=feedback, feedback_memory="fp32", moments="fp32", refresh_interval=2
    )
    attachment = attachment_of(model)
    assert attachment is not None
    collectors = attachment.window.collectors
    for ids in batches(7):
        model(ids).backward()
        before = []
        for (_, weight), collector in zip(attachment.projected, collectors, strict=True):
            sample, basis, state = collector.sample, collector.basis.matrix_NR, optimizer.state[collector.coordinates]
            assert sample is not None
            assert basis is not None
            error = state["error"].clone() if "error" in state else torch.zeros_like(weight)
            estimate = collector.signal_share() * sample.left_KM.T @ sample.right_KN
            before.append((weight.detach().clone(), basis, error, estimate))
        gradients = [collector.coordinates.grad for collector in collectors]
        moments = [{k: v.clone() for k, v in optimizer.state[c.coordinates].items() if k != "error"} for c in collectors]
        optimizer.step()
        optimizer.zero_grad()
        for (_, weight), collector, (old, basis, error, residual), grad, moment in zip(
            attachment.projected, collectors, before, gradients, moments, strict=True
        ):
            assert grad is not None
            first = torch.zeros_like(grad)
            m, v, t = moment.get("exp_avg", first), moment.get("exp_avg_sq", first), int(moment.get("step", 0)) + 1
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            direction = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            change = (weight.detach() - old) / (-1e-3 * (weight.shape[1] / 4) ** 0.25)
            phi = direction.norm() / grad.norm()
            remembered = optimizer.state[collector.coordinates].get("error", torch.zeros_like(error)) - error
            torch.testing.assert_close(change - direction @ basis.T + remembered, phi * residual, rtol=1e-8, atol=1e-9)
