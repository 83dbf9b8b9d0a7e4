"""APOLLO: the gradient itself, scaled channel by channel as Adam would in a random subspace (Zhu et al., arXiv 2412.05270).

    W ← W − η √scale · s ⊙ G,   s = ‖Adam(P G)‖ / ‖P G‖ for each channel,   P random, drawn anew every update_proj_gap steps

with Fira's limiter on the growth of the update's norm. With ``rank=1, scale_type="tensor", scale=128`` it is APOLLO-Mini.

The authors' package, apollo-torch 1.0.3, unchanged; mind its licence (CC BY-NC: no commercial use). As with galore-torch, only
its file ``apollo`` is loaded, because its ``__init__.py`` wants bitsandbytes: ``pip install --no-deps apollo-torch``.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from gradlite.errors import GradLiteError
from gradlite.methods.method import Betas, Count, Epsilon, Method, Rate
from gradlite.methods.packages import require_part
from gradlite.methods.projected import ProjectedAdamW, ProjectionSide, Scale, projected_groups

INSTALL = "--no-deps apollo-torch"


def apollo(
    model: nn.Module,
    lr: Rate,
    *,
    rank: Count = 256,
    update_proj_gap: Count = 200,
    scale: Scale = 1.0,
    scale_type: Literal["channel", "tensor"] = "channel",
    proj: Literal["random", "svd"] = "random",
    proj_type: ProjectionSide = "std",
    target_modules: list[str] = ["attn", "mlp"],  # noqa: B006 - never changed
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-6,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> Method:
    """``apollo_torch.APOLLOAdamW`` with the defaults of the authors' README for APOLLO (rank 256, channels, scale 1)."""
    check_further("apollo", {"proj_type": proj_type, "scale_type": scale_type})
    package = require_part("apollo_torch", "apollo", "apollo", INSTALL)
    settings = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    groups = projected_groups(model, target_modules, weight_decay, {**settings, "proj": proj, "scale_type": scale_type})
    optimizer = package.AdamW(groups, lr=lr, betas=betas, eps=eps)
    projector = package.GradientProjector if proj == "random" else package.GaLoreProjector
    return ProjectedAdamW("apollo", model, optimizer, projector, checkpointing=checkpointing)


def check_further(_: str, options: Mapping[str, Any]) -> None:
    """What the types of the options do not say. Raises GradLiteError for sides whose factors the package does not fit to
    channels: it takes those of ``proj_type="std"`` for granted.
    """
    side = options.get("proj_type", "std")
    if side != "std" and options.get("scale_type", "channel") == "channel":
        raise GradLiteError(
            f"method 'apollo' with proj_type {side!r} needs scale_type 'tensor'; give it, or leave proj_type out."
        )
