"""One AdamW direction, as a pure function, and its scale in a subspace. Source: arXiv 1711.05101; docs/method.md, section 3."""

from torch import Tensor


def adam_direction_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, beta1: float, beta2: float, eps: float
) -> Tensor:
    """``m̂ / (√v̂ + ε)`` after moving both moments (in place) towards ``grad``.

    All tensors of one shape and dtype: float32 or wider, for in bfloat16 ``β₂ v`` rounds back to ``v``, which then never
    decays (as in torch's own AdamW on bfloat16 weights, and in FOAM and LDAdam on them). ``step`` counts from 1. The learning
    rate, the weight decay and the subspace scale are the caller's.
    """
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    root = exp_avg_sq.sqrt().div_((1.0 - beta2**step) ** 0.5).add_(eps)
    return (exp_avg / (1.0 - beta1**step)).div_(root)


def subspace_scale(width: int, rank: int) -> float:
    """``s = (n/r)^¼``: what makes AdamW's learning rates those of a basis of rank r in n dimensions; 1 at full rank.

    ``√(n/r)`` would make the update as long as AdamW's, which was measured to be too long: docs/method.md, section 3. At
    ``(n/r)^¼`` the best rates of both methods agree within a factor of 1.6 on two data sets, by parabolas through the sweeps.
    """
    return float((width / rank) ** 0.25)
