"""Fira: GaLore, plus the gradient outside the subspace, scaled like what is inside (Chen et al., arXiv 2410.01623).

    W ← W − η [α P ψ(R) + φ ⊙ (G − α P R)],   R = Pᵀ G,   φ = ‖ψ(R)‖ / ‖R‖ column by column

where ``ψ`` is Adam, and a limiter keeps the norm of the second term from growing by more than 1 % a step.

The authors' package, fira 1.0.2, unchanged. It asks for bitsandbytes and tensorly and uses neither: ``pip install --no-deps
fira``. Its ``divide_params`` prints a line for each layer; the same groups are made here.
"""

from torch import nn

from gradlite.methods.method import Betas, Count, Epsilon, Method, Rate
from gradlite.methods.packages import require
from gradlite.methods.projected import ProjectedAdamW, ProjectionSide, Scale, projected_groups

INSTALL = "--no-deps fira"


def fira(
    model: nn.Module,
    lr: Rate,
    *,
    rank: Count = 8,
    update_proj_gap: Count = 200,
    alpha: Scale = 1.0,
    proj_type: ProjectionSide = "std",
    target_modules: list[str] = ["attn", "mlp"],  # noqa: B006 - never changed
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-6,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> Method:
    """``fira.FiraAdamW``. Rank and layers are those of the example in the authors' README, the rest is their function's
    defaults. Their fine-tuning of LLaMA-7B has rank 32, alpha 64; their pre-training of 60 million parameters rank 128, alpha
    0.25.
    """
    package = require("fira", "fira", INSTALL)
    projection = require("fira.gradient_projection", "fira", INSTALL)
    settings = {"rank": rank, "update_proj_gap": update_proj_gap, "alpha": alpha, "proj_type": proj_type}
    groups = projected_groups(model, target_modules, weight_decay, settings)
    optimizer = package.FiraAdamW(groups, lr=lr, betas=betas, eps=eps, no_deprecation_warning=True)
    return ProjectedAdamW("fira", model, optimizer, projection.GradientProjector, checkpointing=checkpointing)
