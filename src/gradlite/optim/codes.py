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


def num_code_bytes(num_elements: int) -> int:
    """Bytes of one coded moment of so many elements, its scales included."""
    num_blocks = -(-num_elements // BLOCK)
    return num_blocks * (BLOCK + 4)


def empty_codes(num_elements: int, signed: bool, device: torch.device) -> Codes:
    """Codes of zeros."""
    num_blocks = -(-num_elements // BLOCK)
    dtype = torch.int8 if signed else torch.uint8
    return Codes(torch.zeros(num_blocks * BLOCK, dtype=dtype, device=device), torch.zeros(num_blocks, device=device))


def _blocks(values: Tensor) -> Tensor:
    flat = values.flatten()
    padding = -flat.numel() % BLOCK
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    return flat.view(-1, BLOCK)


def encode_signed(values: Tensor, noise: Tensor, into: Codes) -> None:
    """Codes a ratio (float32, any shape) evenly. ``noise``: uniform in [0, 1), one for every place in ``into``."""
    blocks = _blocks(values)
    scale = blocks.abs().amax(1)
    level = (blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).mul_(127.0)
    level.add_(noise[: level.numel()].view_as(level)).floor_().clamp_(-127.0, 127.0)
    into.codes.copy_(level.flatten())
    into.scale.copy_(scale)


def decode_signed(codes: Codes, shape: torch.Size) -> Tensor:
    """The ratio as float32 of the given shape."""
    values = codes.codes.view(-1, BLOCK).float().mul_((codes.scale / 127.0)[:, None])
    return values.flatten()[: shape.numel()].view(shape)


def encode_unsigned(values: Tensor, noise: Tensor, into: Codes) -> None:
    """Codes a second moment (float32, ≥ 0, any shape). ``noise`` as in :func:`encode_signed`."""
    blocks = _blocks(values)
    scale = blocks.amax(1)
    unit = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    lower = unit.sqrt().sqrt_().sqrt_().mul_(255.0).floor_().clamp_(max=254.0)
    below = _eighth(lower / 255.0)
    odds = (unit - below).div_(_eighth(lower.add(1.0).div_(255.0)).sub_(below))
    level = lower.add_(odds > noise[: unit.numel()].view_as(unit))
    into.codes.copy_(torch.where(blocks > 0, level.clamp_min(1.0), level).flatten())
    into.scale.copy_(scale)


def _eighth(level: Tensor) -> Tensor:
    return level.square_().square_().square_()


def decode_unsigned(codes: Codes, shape: torch.Size) -> Tensor:
    """The second moment as float32 of the given shape."""
    level = codes.codes.view(-1, BLOCK).float().div_(255.0)
    values = _eighth(level).mul_(codes.scale[:, None])
    return values.flatten()[: shape.numel()].view(shape)
