"""Ways to write a tensor down for the backward pass, as pure functions that torch.compile can fuse with their neighbours.

Shape suffixes: T rows (tokens), N width, G groups of one row, S elements of a group.

Integer codes share one scale a group of neighbours in a row. Rounding is stochastic: ``floor(x/scale + u)`` with ``u`` uniform
in [0, 1) has the mean ``x/scale``, so errors average out over tokens instead of piling up (as in GACT, arXiv 2206.11357).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Rows ``x_TN`` to *leaves*, the tensors that wait, and back."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def is_lossy(self) -> bool:
        """Whether :meth:`encode` rounds, which it does stochastically, and so needs noise."""

    @property
    def num_leaves(self) -> int:
        """Tensors that :meth:`encode` makes."""

    def encode(self, x_TN: Tensor, noise_TN: Tensor | None) -> tuple[Tensor, ...]:
        """The leaves. ``noise_TN``: uint8, uniform; None if it is not lossy."""

    def decode(self, leaves: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The rows again, T×N in ``dtype``."""

    def nbytes(self, num_rows: int, width: int, itemsize: int) -> int:
        """Bytes of the leaves of ``num_rows`` rows whose elements had ``itemsize`` bytes."""

    def __hash__(self) -> int:
        """Codecs are constants of compiled kernels, which are looked up by them."""


@dataclass(frozen=True)
class Exact:
    """The tensor itself."""

    name = "exact"
    is_lossy = False
    num_leaves = 1

    def encode(self, x_TN: Tensor, noise_TN: Tensor | None) -> tuple[Tensor, ...]:
        return (x_TN,)

    def decode(self, leaves: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return leaves[0].to(dtype)

    def nbytes(self, num_rows: int, width: int, itemsize: int) -> int:
        return num_rows * width * itemsize


def group_size(width: int) -> int:
    """Elements that share a scale: 64 where that divides the width, else its largest divisor from 16 to 128, else the row."""
    if width % 64 == 0:
        return 64
    return next((size for size in range(128, 15, -1) if width % size == 0), width)


def _grouped(x_TN: Tensor) -> Tensor:
    return x_TN.unflatten(-1, (-1, group_size(x_TN.shape[-1])))


def _scaled_codes(x_TN: Tensor, noise_TN: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Codes in [−limit, limit] as float32 (T×G×S), and their scales in bfloat16 (T×G)."""
    x_TGS = _grouped(x_TN).float()
    # Rounded up, so that the largest element still lies within the codes after the scale has become a bfloat16.
    scale_TG = (x_TGS.abs().amax(-1) * ((1.0 + 2.0**-7) / limit)).to(torch.bfloat16)
    inverse_TG = 1.0 / scale_TG.float().clamp_min(1e-30)
    uniform_TGS = _grouped(noise_TN).float() * (1.0 / 256.0) + (1.0 / 512.0)
    codes_TGS = torch.floor(x_TGS * inverse_TG[..., None] + uniform_TGS)
    return codes_TGS.clamp(-limit, limit), scale_TG


@dataclass(frozen=True)
class Int8:
    """One byte an element, and a bfloat16 scale a group. Error of an element: below one step, 1/126 of the group's largest."""

    name = "int8"
    is_lossy = True
    num_leaves = 2

    def encode(self, x_TN: Tensor, noise_TN: Tensor | None) -> tuple[Tensor, ...]:
        assert noise_TN is not None
        codes_TGS, scale_TG = _scaled_codes(x_TN, noise_TN, 127)
        return codes_TGS.flatten(-2).to(torch.int8), scale_TG

    def decode(self, leaves: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes_TN, scale_TG = leaves
        return (_grouped(codes_TN).float() * scale_TG.float()[..., None]).flatten(-2).to(dtype)

    def nbytes(self, num_rows: int, width: int, itemsize: int) -> int:
        return num_rows * (width + 2 * (width // group_size(width)))


@dataclass(frozen=True)
class Int4:
    """Two elements a byte, and a bfloat16 scale a group; widths must be even. Error of an element: below 1/6 of the largest."""

    name = "int4"
    is_lossy = True
    num_leaves = 2

    def encode(self, x_TN: Tensor, noise_TN: Tensor | None) -> tuple[Tensor, ...]:
        assert noise_TN is not None
        codes_TGS, scale_TG = _scaled_codes(x_TN, noise_TN, 7)
        low_TH, high_TH = (codes_TGS.flatten(-2) + 8.0).to(torch.uint8).chunk(2, -1)
        return low_TH | (high_TH << 4), scale_TG

    def decode(self, leaves: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        packed_TH, scale_TG = leaves
        codes_TN = torch.cat((packed_TH & 15, packed_TH >> 4), -1)
        codes_TGS = codes_TN.unflatten(-1, (scale_TG.shape[-1], -1)).float() - 8.0
        return (codes_TGS * scale_TG.float()[..., None]).flatten(-2).to(dtype)

    def nbytes(self, num_rows: int, width: int, itemsize: int) -> int:
        return num_rows * (width // 2 + 2 * (width // group_size(width)))


EXACT, INT8, INT4 = Exact(), Int8(), Int4()
