"""GaLore: AdamW's moments in a low-rank projection of the gradient (Zhao et al., arXiv 2403.03507).

For a weight with gradient ``G`` (m×n, m ≥ n) and the leading right singular vectors ``P`` (n×r) of the gradient of some earlier
step: ``W ← W − η α Adam(G P) Pᵀ``; ``P`` is made anew, by a singular value decomposition, every ``update_proj_gap`` steps.

The authors' package, galore-torch 1.0, unchanged. Its ``__init__.py`` imports bitsandbytes for an 8-bit variant that is not
used here, so only its file ``adamw`` is loaded, and bitsandbytes need not be there: ``pip install --no-deps galore-torch``. In
float32 the package keeps the whole matrix of singular vectors behind each ``P`` (a view of it); ``state_bytes`` counts what is
kept.
"""

from torch import nn

from gradlite.methods.method import Betas, Count, Epsilon, Method, Rate
from gradlite.methods.packages import require_part
from gradlite.methods.projected import ProjectedAdamW, ProjectionSide, Scale, projected_groups

INSTALL = "--no-deps galore-torch"


def galore(
    model: nn.Module,
    lr: Rate,
    *,
    rank: Count = 128,
    update_proj_gap: Count = 200,
    scale: Scale = 0.25,
    proj_type: ProjectionSide = "std",
    target_modules: list[str] = ["attn", "mlp"],  # noqa: B006 - never changed
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-6,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> Method:
    """``galore_torch.GaLoreAdamW``. Rank, gap, scale and side are those of the usage in the authors' README; the linear layers
    of attention and MLP are projected, as their training script does. Their fine-tuning of RoBERTa has rank 4, scale 4, gap
    500.
    """
    package = require_part("galore_torch", "adamw", "galore", INSTALL)
    projectors = require_part("galore_torch", "galore_projector", "galore", INSTALL)
    settings = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    groups = projected_groups(model, target_modules, weight_decay, settings)
    optimizer = package.AdamW(groups, lr=lr, betas=betas, eps=eps, no_deprecation_warning=True)
    return ProjectedAdamW("galore", model, optimizer, projectors.GaLoreProjector, checkpointing=checkpointing)
