"""Rows of tokens, in the shape of the tensor that they came from."""

import torch
from torch import Tensor


def in_shape_of(x: Tensor, y_TM: Tensor) -> Tensor:
    """``y`` (T×M) as ``(…, M)`` where ``x`` is ``(…, N)``, without a copy, and not as a view.

    For results of autograd functions: a view that was made in one must not be changed in place, and some models add their
    residuals in place.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y_TM, [*x.shape[:-1], y_TM.shape[1]])
    return shaped
