"""Codes are unbiased, within their bound, of the bytes they claim, and defined for every width and magnitude."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gradlite.hold.codec import EXACT, INT4, INT8, Codec, group_size

CODES: dict[str, tuple[Codec, int]] = {"int8": (INT8, 127), "int4": (INT4, 7)}
WIDTHS = (36, 64, 96, 128, 130, 192)


def noise(rows: int, width: int) -> Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normal(rows: int, width: int, **options: Any) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1), **options)


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x, noise(x.shape[0], x.shape[1])), x.dtype)


def test_groups_divide_the_width() -> None:
    assert [group_size(width) for width in (17, 36, 64, 96, 100, 130, 131, 192, 4096)] == [17, 36, 64, 96, 100, 65, 131, 64, 64]


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_error_of_every_element_is_below_one_step(name: str, width: int) -> None:
    codec, limit = CODES[name]
    x = normal(20, width, dtype=torch.float64)
    groups = x.unflatten(-1, (-1, group_size(width)))
    step = groups.abs().amax(-1, keepdim=True) / (limit - 1)
    error = (round_trip(codec, x) - x).unflatten(-1, (-1, group_size(width))).abs()
    assert (error < step).all()
    assert (error > 0.6 * step).any()  # rounded up or down by chance, not to the nearest


def test_odd_widths_in_eight_bits() -> None:
    x = normal(5, 17)
    assert ((round_trip(INT8, x) - x).abs() < x.abs().amax(-1, keepdim=True) / 126).all()


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("width", [36, 130])
def test_codes_are_unbiased(name: str, width: int) -> None:
    """The mean of 2,000 draws is within five standard errors of the truth, for every element."""
    codec, limit = CODES[name]
    x = normal(1, width, dtype=torch.float64)
    draws = round_trip(codec, x.expand(2000, width))
    step = x.unflatten(-1, (-1, group_size(width))).abs().amax(-1, keepdim=True) / limit
    standard_error = (step * 0.5 / 2000**0.5).expand(1, -1, group_size(width)).flatten(1)
    # The scale's rounding to bfloat16 is no bias: decoding multiplies by the scale that encoding divided by.
    assert ((draws.mean(0, keepdim=True) - x).abs() < 5 * standard_error + 1e-12).all()


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_huge_and_tiny_rows(name: str, dtype: torch.dtype) -> None:
    codec, limit = CODES[name]
    x = normal(4, 64).to(dtype)
    x[0] = 0.0
    x[1] *= 1e4 if dtype == torch.float16 else 1e30
    x[2] *= 1e-4 if dtype == torch.float16 else 1e-28
    x[3, 1:] = 0.0
    found = round_trip(codec, x)
    assert found.dtype == dtype
    assert (found[0] == 0.0).all()
    assert (found[3, 1:] == 0.0).all()
    step = x.float().abs().amax(-1, keepdim=True) / (limit - 1)
    assert ((found.float() - x.float()).abs() <= 1.01 * step).all()


@pytest.mark.parametrize("name", CODES)
def test_what_is_not_finite_is_not_hidden(name: str) -> None:
    """Steps with a NaN are skipped: codes must not turn one into a harmless number."""
    codec, _ = CODES[name]
    x = normal(3, 64)
    x[0, 5], x[1, 5] = float("nan"), float("inf")
    found = round_trip(codec, x)
    assert not found[0].isfinite().all()
    assert not found[1].isfinite().all()
    assert found[2].isfinite().all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("codec", [EXACT, INT8, INT4], ids=lambda codec: codec.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_predicted_bytes_are_those_of_the_leaves(codec: Codec, width: int, dtype: torch.dtype) -> None:
    x = normal(11, width).to(dtype)
    leaves = codec.encode(x, noise(11, width) if codec.is_lossy else None)
    assert len(leaves) == codec.num_leaves
    assert sum(leaf.nbytes for leaf in leaves) == codec.nbytes(11, width, x.element_size())


def test_exact_is_the_tensor_itself() -> None:
    x = normal(3, 5)
    (leaf,) = EXACT.encode(x, None)
    assert leaf is x
    assert EXACT.decode((leaf,), torch.float32) is x
