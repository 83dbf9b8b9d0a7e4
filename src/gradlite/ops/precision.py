"""The format that sums and nonlinear functions are computed in."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in float32; float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
