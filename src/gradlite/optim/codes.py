"""Optimizer moments in 8 bits: block-wise codes with a power-law spacing.

A block of 256 values shares one float32 scale, its largest magnitude. A second moment ``v`` is coded as ``c⁸`` with ``c``
evenly spaced in [0, 1]: nineteen decades with a relative step that grows slowly towards small values, by cheap elementwise
arithmetic, where a look-up table would need a search. A first moment is coded as the *ratio* ``m/√v``, which is what Adam steps
by: of the order of one, so evenly spaced codes fit it, and where ``v`` is coded too small or too large ``m`` is so by the
root of it and the step stays right. (Coding ``m`` itself, a tiny ``v`` beside an ``m`` that rounding had kept alive made single
steps of 26 to 590 units where exact moments make 1: docs/log.md.)

Both are rounded stochastically: a second moment changes by a thousandth a step, which rounding to nearest would never let
through. The odds are set between the two neighbouring *values*, so that the mean is right although codes are not evenly spaced
(a bias here would add up over the thousand steps that a second moment remembers). A positive second moment is never coded as
zero.

Error: at most one code step, ``1/127`` of the block's largest ratio, and ``8/255`` of a second moment near its block's maximum;
guarded by tests/optim/test_codes.py. Block-wise 8-bit states: arXiv 2110.02861; the rest is our own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256


class Codes(NamedTuple):
    """``codes``: int8 or uint8, length a multiple of 256. ``scale``: float32, one a block."""

    codes: Tensor
    scale: Tensor

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Views B×256 and B×1."""
        return self.codes.view(-1, BLOCK), self.scale[:, None]

    def store(self, codes_BS: Tensor, scale_B1: Tensor) -> None:
        """Writes blocks."""
        self.codes.copy_(codes_BS.view(-1))
        self.scale.copy_(scale_B1.view(-1))


def num_code_bytes(num_elements: int) -> int:
    """Bytes of one coded moment of so many elements, its scales included."""
    num_blocks = -(-num_elements // BLOCK)
    return num_blocks * (BLOCK + 4)


def empty_codes(num_elements: int, signed: bool, device: torch.device) -> Codes:
    """Codes of zeros."""
    num_blocks = -(-num_elements // BLOCK)
    dtype = torch.int8 if signed else torch.uint8
    return Codes(torch.zeros(num_blocks * BLOCK, dtype=dtype, device=device), torch.zeros(num_blocks, device=device))


def blocks_of(values: Tensor) -> Tensor:
    """Values of any shape as B×256, zeros filling the last block."""
    flat = values.flatten()
    padding = -flat.numel() % BLOCK
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    return flat.view(-1, BLOCK)


def values_of(blocks_BS: Tensor, shape: torch.Size) -> Tensor:
    """Undoes :func:`blocks_of`."""
    return blocks_BS.flatten()[: shape.numel()].view(shape)


def signed_codes(blocks_BS: Tensor, noise_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8) and scales (B×1) of ratios in float32, evenly spaced. ``noise``: uniform in [0, 1)."""
    scale_B1 = blocks_BS.abs().amax(1, keepdim=True)
    level_BS = blocks_BS / scale_B1.clamp_min(torch.finfo(torch.float32).tiny) * 127.0
    return (level_BS + noise_BS).floor().clamp(-127.0, 127.0).to(torch.int8), scale_B1


def signed_values(codes_BS: Tensor, scale_B1: Tensor) -> Tensor:
    """The ratios in float32."""
    return codes_BS.float() * (scale_B1 / 127.0)


def unsigned_codes(blocks_BS: Tensor, noise_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and scales (B×1) of second moments, float32 and at least 0. ``noise``: uniform in [0, 1)."""
    scale_B1 = blocks_BS.amax(1, keepdim=True)
    unit_BS = blocks_BS / scale_B1.clamp_min(torch.finfo(torch.float32).tiny)
    lower_BS = (unit_BS.sqrt().sqrt().sqrt() * 255.0).floor().clamp(max=254.0)
    below_BS, above_BS = _eighth(lower_BS / 255.0), _eighth((lower_BS + 1.0) / 255.0)
    level_BS = lower_BS + (unit_BS - below_BS > noise_BS * (above_BS - below_BS)).float()
    level_BS = torch.where(blocks_BS > 0, level_BS.clamp_min(1.0), level_BS)
    return level_BS.to(torch.uint8), scale_B1


def unsigned_values(codes_BS: Tensor, scale_B1: Tensor) -> Tensor:
    """The second moments in float32."""
    return _eighth(codes_BS.float() / 255.0) * scale_B1


def _eighth(level: Tensor) -> Tensor:
    return level.square().square().square()
