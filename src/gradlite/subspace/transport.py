"""Adam's moments move with the basis.

Shape suffixes: M output width, R rank. Source: docs/method.md, section 5; the second moment's rule is LDAdam's
(arXiv 2410.16103): the mean part rotates, the variance part rotates with squared cosines.
"""

from torch import Tensor


def transport_moments(
    exp_avg_MR: Tensor, exp_avg_sq_MR: Tensor, rotation_RR: Tensor, correction1: float, correction2: float
) -> tuple[Tensor, Tensor]:
    """Moments in the new basis.

    ``m' = m Q`` and ``v̂' = |(v̂ − m̂²)(Q∘Q)| + (m̂ Q)²`` with ``Q = PᵀP'`` (R×R), ``m̂ = m/correction1`` and
    ``v̂ = v/correction2`` (Adam's bias corrections ``1 − βᵗ``). All tensors in one floating dtype; new tensors are returned.
    For ``Q = I`` and ``v̂ ≥ m̂²`` nothing changes; second moments never turn negative.
    """
    rotated_MR = exp_avg_MR @ rotation_RR
    mean_MR = exp_avg_MR / correction1
    variance_MR = exp_avg_sq_MR / correction2 - mean_MR.square()
    second_MR = (variance_MR @ rotation_RR.square()).abs() + (rotated_MR / correction1).square()
    return rotated_MR, second_MR * correction2
