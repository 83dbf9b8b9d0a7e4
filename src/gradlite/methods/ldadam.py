"""LDAdam: Adam in a subspace that moves a little every step, with error feedback (Robert et al., arXiv 2410.16103).

For a gradient ``g`` (m×n, m ≤ n; a taller one from the other side), error memory ``e``, basis ``P`` (m×r) and ``Q = Pᵀ P₋₁``:

    a = g + e                 b = ρ P₋₁ m̂₋₁ + (1 − ρ) a          P = QR(b bᵀ P₋₁)          g̃ = Pᵀ a
    m₋ = Q m₋₁                v₋ = (1 − β₂^(t−1)) |Q∘Q (v̂₋₁ − m̂₋₁²) + (Q m̂₋₁)²|
    m = β₁ m₋ + (1 − β₁) g̃    v = β₂ v₋ + (1 − β₂) g̃²           W ← (1 − ηλ) W − η P m̂ / (√v̂ + ε)
    e = a − P g̃ + β₁/(1 − β₁) (P₋₁ m₋₁ − P m₋)

(hats: Adam's bias corrections). The first ``P`` holds the leading singular vectors of the first gradient.

By hand from these equations: ista-daslab-optimizers, the authors' package, has no LDAdam in it (1.1.15), depends on CUDA
kernels and torchvision, and their repository (IST-DASLab/LDAdam) is on no index. As in theirs, the error memory waits in the
place of the gradient: ``backward`` puts it into ``.grad``, where autograd adds to it, so it costs no second matrix; between
steps it is counted as the optimizer's. Hence the norm that ``clip`` bounds is that of ``g + e``, as in their training script. A
step that is skipped for a gradient that is not finite loses the error memory with it.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from gradlite.methods.method import Betas, Count, Epsilon, Method, Rate, linear_weights, without
from gradlite.optim.adam import adam_direction_


def ldadam(
    model: nn.Module,
    lr: Rate,
    *,
    rank: Count = 16,
    rho: Annotated[float, Field(ge=0, lt=1)] = 0.908,
    target_modules: list[str] = ["attn", "mlp"],  # noqa: B006 - never changed
    betas: Betas = (0.908, 0.99),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> "LDAdam":
    """Rank, ρ and betas are those of the usage in the authors' README; the linear layers of attention and MLP are projected, as
    their training script does, everything else is trained by plain AdamW.
    """
    projected = linear_weights(model, target_modules)
    others = without(model, projected)
    groups: list[dict[str, Any]] = [{"params": others}, {"params": projected, "rank": rank, "rho": rho}]
    optimizer = LDAdamW([group for group in groups if group["params"]], lr, betas, eps, weight_decay)
    return LDAdam("ldadam", model, optimizer, checkpointing=checkpointing)


class LDAdam(Method):
    """Puts the error memory where the gradient will be, before every backward pass."""

    optimizer: "LDAdamW"
    _went_backward = False  # since the last step() or zero_grad()

    def backward(self, loss: Tensor) -> None:
        self.optimizer.errors_to_gradients()
        super().backward(loss)
        self._went_backward = True

    def step(self) -> None:
        """One update. Raises GradLiteError where gradients were made without the error memory."""
        if self.optimizer.has_left_out_error() or (self.optimizer.has_projected_gradient() and not self._went_backward):
            self._refuse_other_backward()
        super().step()
        self._went_backward = False

    def zero_grad(self) -> None:
        super().zero_grad()
        self._went_backward = False


class LDAdamW(Optimizer):
    """LDAdam on groups with ``rank`` and ``rho``, AdamW on the others. All state has the parameters' dtype."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def errors_to_gradients(self) -> None:
        """Moves every error memory into the ``.grad`` of its weight, where there is none yet."""
        for weight, state in self.state.items():
            if weight.grad is None and "error" in state:
                weight.grad = state.pop("error")

    def has_left_out_error(self) -> bool:
        """Whether some weight has a gradient that its error memory did not get into."""
        return any(weight.grad is not None and "error" in state for weight, state in self.state.items())

    def has_projected_gradient(self) -> bool:
        """Whether some projected weight has a gradient."""
        return any(weight.grad is not None for group in self.param_groups if "rank" in group for weight in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; afterwards the gradients of projected weights are gone, turned into their error memory."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, rank = self.state[parameter], group.get("rank")
        gradient = parameter.grad
        assert gradient is not None
        if "step" not in state:
            state["step"] = torch.zeros(())
        before = int(state["step"].item())
        state["step"] += 1
        beta1, beta2 = group["betas"]
        if rank is None:
            if before == 0:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            direction = adam_direction_(gradient, state["exp_avg"], state["exp_avg_sq"], before + 1, beta1, beta2, group["eps"])
        else:
            tall = gradient.shape[0] > gradient.shape[1]
            wide = gradient.T if tall else gradient
            direction = projected_direction_(wide, state, before, min(rank, wide.shape[0]), group)
            direction = direction.T if tall else direction
            state["error"], parameter.grad = gradient, None
        parameter.mul_(1.0 - float(group["lr"]) * group["weight_decay"]).add_(direction, alpha=-float(group["lr"]))


def projected_direction_(
    accumulated_MN: Tensor, state: dict[str, Tensor], before: int, rank: int, group: dict[str, Any]
) -> Tensor:
    """``P m̂ / (√v̂ + ε)`` after ``before`` earlier steps; ``state`` moves on, and ``accumulated_MN`` (``a``) becomes ``e``."""
    beta1, beta2 = group["betas"]
    if before == 0:
        left_MM, _, _ = torch.linalg.svd(accumulated_MN.float(), full_matrices=False)
        basis_MR = left_MM[:, :rank].to(accumulated_MN.dtype).contiguous()
        exp_avg_RN = accumulated_MN.new_zeros(rank, accumulated_MN.shape[1])
        exp_avg_sq_RN = torch.zeros_like(exp_avg_RN)
        compressed_RN = basis_MR.T @ accumulated_MN
        accumulated_MN.sub_(basis_MR @ compressed_RN)
    else:
        old_MR, old_avg_RN = state["basis"], state["exp_avg"]
        corrected_RN = old_avg_RN / (1.0 - beta1**before)
        target_MN = torch.lerp(accumulated_MN, old_MR @ corrected_RN, group["rho"])
        basis_MR = _orthonormal(target_MN @ (target_MN.T @ old_MR))
        rotation_RR = basis_MR.T @ old_MR
        exp_avg_RN = rotation_RR @ old_avg_RN
        correction2 = 1.0 - beta2**before
        variance_RN = state["exp_avg_sq"] / correction2 - corrected_RN.square()
        mean_RN = exp_avg_RN / (1.0 - beta1**before)
        exp_avg_sq_RN = correction2 * (rotation_RR.square() @ variance_RN + mean_RN.square()).abs()
        compressed_RN = basis_MR.T @ accumulated_MN
        lost_share = beta1 / (1.0 - beta1)
        accumulated_MN.sub_(basis_MR @ (compressed_RN + lost_share * exp_avg_RN)).add_(old_MR @ old_avg_RN, alpha=lost_share)
    direction_RN = adam_direction_(compressed_RN, exp_avg_RN, exp_avg_sq_RN, before + 1, beta1, beta2, group["eps"])
    state.update(basis=basis_MR, exp_avg=exp_avg_RN, exp_avg_sq=exp_avg_sq_RN)
    return basis_MR @ direction_RN


def _orthonormal(columns: Tensor) -> Tensor:
    orthonormal, _ = torch.linalg.qr(columns.float())  # which has no half precision
    return orthonormal.to(columns.dtype)
