"""AdamW: torch's own, in the precision of the weights; all peers are measured against it."""

import torch
from torch import nn

from gradlite.methods.method import Betas, Epsilon, Method, Rate, param_groups, trainable


def adamw(
    model: nn.Module,
    lr: Rate,
    *,
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> Method:
    """``torch.optim.AdamW`` (fused: the fastest it has, on CPU and CUDA). Norms and biases are not decayed."""
    groups = param_groups([parameter for _, parameter in trainable(model)], weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return Method("adamw-checkpointed" if checkpointing else "adamw", model, optimizer, checkpointing=checkpointing)


def adamw_checkpointed(
    model: nn.Module,
    lr: Rate,
    *,
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    checkpointing: bool = True,
) -> Method:
    """AdamW with gradient checkpointing: the usual way to save memory."""
    return adamw(model, lr, betas=betas, eps=eps, weight_decay=weight_decay, checkpointing=checkpointing)
