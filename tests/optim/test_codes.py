"""8-bit moments and stochastic rounding: unbiased, with the error they state."""

import pytest
import torch
from torch import Tensor

from gradlite.optim.adam import adam_direction_
from gradlite.optim.codes import (
    blocks_of,
    empty_codes,
    num_code_bytes,
    signed_codes,
    signed_values,
    unsigned_codes,
    unsigned_values,
    values_of,
)
from gradlite.optim.moments import FloatMoments, Int8Moments, Moments, moments_for
from gradlite.optim.rounding import TABLE, TILE, NoiseTable, dense_update_, low_rank_update_, round_into_

CPU = torch.device("cpu")


def noise(seed: int = 0) -> NoiseTable:
    return NoiseTable(torch.Generator().manual_seed(seed), CPU)


def values(*shape: int, spread: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=g) * torch.exp(spread * torch.randn(*shape, generator=g))


def roundtrip(x: Tensor, signed: bool, table: NoiseTable) -> Tensor:
    codes, blocks = empty_codes(x.numel(), signed, CPU), blocks_of(x)
    codes.store(*(signed_codes if signed else unsigned_codes)(blocks, table.take_unit(blocks.numel()).view_as(blocks)))
    assert codes.codes.nbytes + codes.scale.nbytes == num_code_bytes(x.numel())
    return values_of((signed_values if signed else unsigned_values)(*codes.blocks()), x.shape)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(7,), (256,), (40, 33)])
def test_codes_are_within_one_step_and_keep_signs_zeros_and_maxima(signed: bool, shape: tuple[int, ...]) -> None:
    x = values(*shape) if signed else values(*shape).square()
    x.view(-1)[3] = 0.0
    decoded = roundtrip(x, signed, noise())
    top, power = (127.0, 1) if signed else (255.0, 8)
    flat, back = x.flatten(), decoded.flatten()
    for start in range(0, flat.numel(), 256):
        block, got = flat[start : start + 256], back[start : start + 256]
        scale = block.abs().max()
        level = ((block.abs() / scale) ** (1 / power) * top).floor()
        step = (((level + 1) / top) ** power - (level / top) ** power) * scale
        assert ((got - block).abs() <= step * 1.001 + 1e-12).all()
        assert (got * block >= 0).all()
        assert got[block.abs().argmax()] == pytest.approx(block[block.abs().argmax()].item(), rel=1e-6)
    assert back[3] == 0.0


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_unbiased(signed: bool) -> None:
    x = values(512, spread=0.5) if signed else values(512, spread=0.5).square() + 1e-4
    draws = torch.stack([roundtrip(x, signed, noise(seed)) for seed in range(60)]).double()
    variance = draws.var(0) / len(draws)
    assert (draws.mean(0) - x).square().sum() < 1.4 * variance.sum() + 1e-12


def test_zeros_stay_zero() -> None:
    for signed in (True, False):
        assert torch.equal(roundtrip(torch.zeros(300), signed, noise()), torch.zeros(300))


@pytest.mark.parametrize(("spread", "bound"), [(1.0, 2.0), (2.0, 3.5), (4.0, 6.0)])
def test_small_moments_beside_large_ones_make_no_giant_steps(spread: float, bound: float) -> None:
    """A second moment coded as zero would: with spread 2 the largest step was 5e5, where exact moments give 1."""
    g = torch.Generator().manual_seed(0)
    size = torch.exp(spread * torch.randn(4096, 4, generator=g))
    memory: Moments = moments_for("int8", size.numel(), torch.float32)
    assert isinstance(memory, Int8Moments)
    state = memory.init(size.shape, size)
    for step in range(1, 61):
        grad = size * torch.randn(size.shape, generator=g)
        direction, _ = memory.advance(state, grad, step, (0.9, 0.999), 1e-8, noise(step))
        assert direction.abs().max() < bound


def test_int8_directions_follow_exact_ones() -> None:
    g = torch.Generator().manual_seed(0)
    size = torch.exp(0.5 * torch.randn(1024, 8, generator=g))
    formats: list[Moments] = [Int8Moments(), FloatMoments()]
    pairs = [(memory, memory.init(size.shape, size)) for memory in formats]
    for step in range(1, 61):
        grad = size * (torch.randn(size.shape, generator=g) + 0.3)
        made = [memory.advance(state, grad, step, (0.9, 0.999), 1e-8, noise(step)) for memory, state in pairs]
        (coded, coded_sum), (exact, exact_sum) = made
        assert (coded - exact).norm() < 0.06 * exact.norm()
        assert coded_sum.item() == pytest.approx(exact_sum.item(), rel=0.02)
    for (memory, state), nbytes in zip(pairs, (2 * 1024 * 8 * 1.016, 8 * 1024 * 8), strict=True):
        assert sum(t.nbytes for t in state.values()) == memory.nbytes(1024 * 8, 4) == pytest.approx(nbytes, rel=1e-3)


def test_advancing_is_reading_adam_and_writing() -> None:
    """In one pass; with the same noise the codes are the same but for a rounding of the last place here and there."""
    g = torch.Generator().manual_seed(0)
    memory, shape = Int8Moments(), torch.Size((100, 77))
    at_once, apart = memory.init(shape, torch.zeros(1)), memory.init(shape, torch.zeros(1))
    for step in range(1, 6):
        grad = torch.randn(shape, generator=g)
        direction, total = memory.advance(at_once, grad, step, (0.9, 0.999), 1e-8, noise(step))
        m, v = memory.read(apart, shape)
        torch.testing.assert_close(direction, adam_direction_(grad, m, v, step, 0.9, 0.999, 1e-8), rtol=1e-4, atol=1e-5)
        assert total.item() == pytest.approx(v.sum().item(), rel=1e-5)
        memory.write(apart, m, v, noise(step))
        for name, value in at_once.items():
            assert (value != apart[name]).float().mean() < (0.01 if "codes" in name else 1.0)
            assert torch.allclose(value.float(), apart[name].float(), atol=1.0 if "codes" in name else 0.0, rtol=1e-5)
        apart = {name: value.clone() for name, value in at_once.items()}


def test_adam_direction_equals_torchs() -> None:
    weight = torch.nn.Parameter(values(20, 3).double())
    twin, m, v = weight.detach().clone(), torch.zeros(20, 3).double(), torch.zeros(20, 3).double()
    oracle = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, betas=(0.8, 0.99), eps=1e-6)
    for step in range(1, 20):
        weight.grad = torch.randn(20, 3, generator=torch.Generator().manual_seed(step)).double()
        oracle.step()
        twin -= 0.1 * adam_direction_(weight.grad, m, v, step, 0.8, 0.99, 1e-6)
        torch.testing.assert_close(weight.detach(), twin, rtol=0, atol=1e-12)


def test_stochastic_rounding_is_unbiased_and_exact_where_it_can_be() -> None:
    x = torch.tensor([1.0 + 2**-9, -1.0 - 2**-10, 3.0, 0.0, 1e-30, -0.3333]).repeat(20_000)
    target = torch.empty_like(x, dtype=torch.bfloat16)
    round_into_(target, x.clone(), noise())
    got, wanted = target.double().view(-1, 6), x[:6].double()
    step = 2.0 ** (wanted.abs().clamp_min(1e-38).log2().floor() - 7)
    assert ((got - wanted).abs() <= step).all()
    assert ((got.mean(0) - wanted).abs() < 4 * step / 2 / 20_000**0.5).all()
    assert (got[:, 2] == 3).all()
    assert (got[:, 3] == 0).all()


def test_tiny_updates_survive_in_bfloat16_only_with_stochastic_rounding() -> None:
    for table, moved in ((noise(), True), (None, False)):
        weight = torch.ones(300, 200, dtype=torch.bfloat16)
        for step in range(20):
            low_rank_update_(weight, torch.ones(300, 1), torch.ones(200, 1), -1e-4, 1.0, noise(step) if table else None)
        change = weight.double().mean().item() - 1.0
        assert change == pytest.approx(-2e-3 if moved else 0.0, rel=0.1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(50, 30), (3, TILE + 5), (TILE // 30 + 7, 30)])
def test_low_rank_update_equals_the_dense_one(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = values(*shape, spread=0.1).to(dtype)
    left, right = values(shape[0], 4).to(compute), values(shape[1], 4).to(compute)
    wanted = 0.9 * weight.double() - 0.01 * left.double() @ right.double().T
    allowed = 1.01 * torch.finfo(dtype).eps * wanted.abs() + (1e-12 if dtype == torch.float64 else 1e-5)
    for table in (None, noise()):
        low = weight.clone()
        low_rank_update_(low, left, right, -0.01, 0.9, table)
        assert ((low.double() - wanted).abs() <= allowed).all()
        dense = weight.clone()
        dense_update_(dense, left @ right.T, -0.01, 0.9, table)
        assert ((dense.double() - wanted).abs() <= allowed).all()


def test_noise_repeats_with_its_seed_and_serves_any_length() -> None:
    first, second = noise(3), noise(3)
    for count in (1, 1000, TILE):
        assert torch.equal(first.take_bits(count), second.take_bits(count))
    long = first.take_unit(2 * TABLE)
    assert len(long) == 2 * TABLE
    assert long.min() >= 0
    assert long.max() < 1
    assert long.mean().item() == pytest.approx(0.5, abs=1e-3)


def test_a_dense_update_may_run_along_columns() -> None:
    """As the direction of a plain matrix with coded moments does."""
    weight, update = torch.zeros(90, 70, dtype=torch.bfloat16), values(70, 90).T
    dense_update_(weight, update, 1.0, 1.0, None)
    assert torch.equal(weight, update.bfloat16())


@pytest.mark.parametrize("tiny", [1e-20, 1e-25, 1e-37])
def test_a_second_moment_that_underflows_sets_no_scale(tiny: float) -> None:
    """One gradient whose square is nothing in float32, among 255 usual ones, which must keep their momentum."""
    moments, generator = Int8Moments(), torch.Generator().manual_seed(0)
    grad = torch.randn(64, 64, generator=generator)
    grad[7, 7] = tiny
    state: dict[str, Tensor] = dict(moments.init(grad.shape, grad))
    for step in range(1, 6):
        noise = NoiseTable(generator, torch.device("cpu"))
        direction, _ = moments.advance(state, grad, step, (0.9, 0.999), 1e-8, noise)
        assert direction.abs().max() < 2.0
    usual = direction.abs()[grad.abs() > 0.3]
    torch.testing.assert_close(usual, torch.ones_like(usual), rtol=0, atol=0.15)


def test_a_dense_update_of_strides_of_its_own() -> None:
    weight = torch.randn(4, 8, 3, 3).bfloat16().to(memory_format=torch.channels_last)
    wanted = weight.float() * 0.5 + 2.0
    dense_update_(weight, torch.ones(4, 8, 3, 3), 2.0, 0.5, None)
    torch.testing.assert_close(weight, wanted.bfloat16(), rtol=0, atol=0)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_update_of_stacked_weights(dtype: torch.dtype) -> None:
    """As one matrix of all their rows, also where their strides allow none."""
    left, right = torch.randn(12, 2), torch.randn(5, 2)
    for weight in (torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, 5, 4, dtype=dtype).transpose(1, 2)):
        wanted = 0.5 * weight.float() - 0.1 * (left @ right.T).view(3, 4, 5)
        low_rank_update_(weight, left, right, -0.1, 0.5, None)
        torch.testing.assert_close(weight, wanted.to(dtype))
