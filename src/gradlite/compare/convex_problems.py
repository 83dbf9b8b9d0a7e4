"""Convex problems with a known optimum, on which the convergence theorem can be tried: data, gradients, suboptimality.

Shape suffixes: T rows of data, B rows of a batch, M outputs, N inputs.

Both problems are ``f(W) = (1/T) Σ_t ℓ(W x_t, y_t)`` without a penalty, in float64: the gradient of a batch is ``δᵀx / B``,
which is just what a linear layer of a network hands to GradLite. The inputs' covariance has eigenvalues spread evenly in the
logarithm over a given number of decades, turned by a random rotation, and the true weights are equally long in each of its
directions. With four decades there is, for every number of steps that is tried, a direction that the iterates are just
reaching; so strong convexity, which would speed things up, does not show. With one decade it does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradlite.errors import GradLiteError

NEWTON_STEPS = 100


@dataclass(frozen=True)
class ConvexProblem:
    """``x_TN``, ``y_TM`` and the optimum, all float64; ``minimum`` is ``f*``."""

    name: str
    x_TN: Tensor
    y_TM: Tensor
    optimum_MN: Tensor
    minimum: float
    output_gradient: Callable[[Tensor, Tensor], Tensor]
    """``∂ℓ/∂(output)`` of each row, from outputs and targets (both B×M); not divided by B."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """``ℓ`` of each row (T), from outputs and targets."""

    def objective(self, weight_MN: Tensor) -> float:
        """``f(W)``."""
        return float(self.loss(self.x_TN @ weight_MN.T, self.y_TM).mean())

    def suboptimality(self, weight_MN: Tensor) -> float:
        """``f(W) − f*``, as small as rounding allows: about 1e-14."""
        return self.objective(weight_MN) - self.minimum

    def gradient(self, weight_MN: Tensor) -> Tensor:
        """``∇f(W)``, M×N."""
        return self.output_gradient(self.x_TN @ weight_MN.T, self.y_TM).T @ self.x_TN / len(self.x_TN)


def least_squares(*, seed: int, rows: int, width: int, outputs: int, decades: float, noise: float) -> ConvexProblem:
    """``ℓ = ½‖W x − y‖²`` with ``y = W_true x + noise·ξ``, ξ standard normal. The optimum is LAPACK's solution."""
    x_TN, true_MN, generator = _inputs_and_truth(seed, rows, width, outputs, decades)
    y_TM = x_TN @ true_MN.T + noise * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    optimum_MN = torch.linalg.lstsq(x_TN, y_TM).solution.T.contiguous()
    return _problem("least squares", x_TN, y_TM, optimum_MN, _squared_gradient, _squared_loss)


def logistic_regression(*, seed: int, rows: int, width: int, outputs: int, decades: float, scale: float) -> ConvexProblem:
    """``ℓ = Σ_m log(1 + exp(∓z_m))``, one binary label an output, drawn from the model at ``scale·W_true``.

    The optimum is found by Newton's method. Raises GradLiteError if no gradient below 1e-12 is reached: if labels can be
    separated, ``f`` has no minimum.
    """
    x_TN, true_MN, generator = _inputs_and_truth(seed, rows, width, outputs, decades)
    chance_TM = torch.sigmoid(x_TN @ (scale * true_MN).T)
    y_TM = (torch.rand(rows, outputs, generator=generator, dtype=torch.float64) < chance_TM).double()
    optimum_MN = torch.stack([_newton(x_TN, y_TM[:, m]) for m in range(outputs)])
    return _problem("logistic regression", x_TN, y_TM, optimum_MN, _logistic_gradient, _logistic_loss)


def _inputs_and_truth(seed: int, rows: int, width: int, outputs: int, decades: float) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    eigenvalues_N = torch.logspace(0.0, -decades, width, dtype=torch.float64)
    rotation_NN = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    normal_TN = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    true_MN = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    return (normal_TN * eigenvalues_N.sqrt()) @ rotation_NN.T, true_MN, generator


def _problem(
    name: str,
    x_TN: Tensor,
    y_TM: Tensor,
    optimum_MN: Tensor,
    output_gradient: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> ConvexProblem:
    minimum = float(loss(x_TN @ optimum_MN.T, y_TM).mean())
    return ConvexProblem(name, x_TN, y_TM, optimum_MN, minimum, output_gradient, loss)


def _squared_gradient(z_BM: Tensor, y_BM: Tensor) -> Tensor:
    return z_BM - y_BM


def _squared_loss(z_TM: Tensor, y_TM: Tensor) -> Tensor:
    return 0.5 * (z_TM - y_TM).square().sum(1)


def _logistic_gradient(z_BM: Tensor, y_BM: Tensor) -> Tensor:
    return torch.sigmoid(z_BM) - y_BM


def _logistic_loss(z_TM: Tensor, y_TM: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z_TM, y_TM, reduction="none").sum(1)


def _newton(x_TN: Tensor, y_T: Tensor) -> Tensor:
    """The optimum of one output (N), by Newton's method with halved steps where a whole one does not lower the objective."""
    weight_N = x_TN.new_zeros(x_TN.shape[1])

    def objective(candidate_N: Tensor) -> float:
        return float(F.binary_cross_entropy_with_logits(x_TN @ candidate_N, y_T))

    for _ in range(NEWTON_STEPS):
        chance_T = torch.sigmoid(x_TN @ weight_N)
        gradient_N = x_TN.T @ (chance_T - y_T) / len(x_TN)
        if float(gradient_N.norm()) < 1e-12:
            if objective(weight_N) < 1e-9:  # separated: the gradient vanishes only towards infinity
                break
            return weight_N
        hessian_NN = (x_TN * (chance_T * (1.0 - chance_T))[:, None]).T @ x_TN / len(x_TN)
        step_N = torch.linalg.solve(hessian_NN, gradient_N)
        here, share = objective(weight_N), 1.0
        # Close to the optimum the objective no longer tells a better point from a worse one: rounding is allowed for.
        while objective(weight_N - share * step_N) > here + 1e-13 and share > 1e-6:
            share /= 2.0
        weight_N = weight_N - share * step_N
    raise GradLiteError("the logistic problem has no minimum that Newton's method finds: give it more rows or a smaller scale.")
