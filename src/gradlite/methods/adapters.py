"""LoRA, DoRA and (IA)³: small adapters are trained by AdamW, the model's own weights are frozen. All three are PEFT's.

LoRA (Hu et al., arXiv 2106.09685): ``W + (α/r) B A``; DoRA (Liu et al., arXiv 2402.09353): LoRA for
the direction, and a learned magnitude beside it; (IA)³ (Liu et al., arXiv 2205.05638): keys, values and MLP activations are
scaled by learned vectors.

``method.model`` is PEFT's wrapper, whose ``save_pretrained`` writes the adapter alone. PEFT keeps adapters of bfloat16 models
in float32.
"""

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from gradlite.errors import GradLiteError
from gradlite.methods.method import Betas, Claims, Count, Epsilon, Method, Rate, param_groups, trainable
from gradlite.methods.packages import hold_back_torchao_lines, require

ADAPTER = Claims(full_parameter=False, accumulation=True, clipping=True)
Dropout = Annotated[float, Field(ge=0, lt=1)]
Modules = str | list[str]


def lora(
    model: nn.Module,
    lr: Rate,
    *,
    rank: Count = 8,
    alpha: Annotated[float, Field(gt=0)] = 8,
    dropout: Dropout = 0.0,
    target_modules: Modules = "all-linear",
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> Method:
    """PEFT's LoRA with PEFT's default rank and alpha, on all linear layers but the head: QLoRA's finding (arXiv 2305.14314)
    is that fewer fall short of full fine-tuning.
    """
    return lora_as(
        "lora", model, lr, rank, alpha, dropout, target_modules, betas, eps, weight_decay, checkpointing=checkpointing
    )


def dora(
    model: nn.Module,
    lr: Rate,
    *,
    rank: Count = 8,
    alpha: Annotated[float, Field(gt=0)] = 8,
    dropout: Dropout = 0.0,
    target_modules: Modules = "all-linear",
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> Method:
    """PEFT's LoRA with ``use_dora``; otherwise as :func:`lora`."""
    return lora_as(
        "dora",
        model,
        lr,
        rank,
        alpha,
        dropout,
        target_modules,
        betas,
        eps,
        weight_decay,
        use_dora=True,
        checkpointing=checkpointing,
    )


def ia3(
    model: nn.Module,
    lr: Rate,
    *,
    target_modules: Modules | None = None,
    feedforward_modules: Modules | None = None,
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> Method:
    """PEFT's (IA)³ on the layers that PEFT names for the kind of model (keys, values and the MLP's last layer). Its authors use
    a learning rate of 3e-3. Weight decay is refused: it would draw scales, which do nothing at 1, towards 0.
    """
    check_further("ia3", {"weight_decay": weight_decay})
    peft = _import_peft("ia3")
    config = peft.IA3Config(target_modules=target_modules, feedforward_modules=feedforward_modules, task_type="CAUSAL_LM")
    return _adapted("ia3", model, config, lr, betas, eps, weight_decay, checkpointing)


def check_further(name: str, options: Mapping[str, Any]) -> None:
    """What the types of the options do not say. Raises GradLiteError for the weight decay of (IA)³."""
    if name == "ia3" and options.get("weight_decay"):
        raise GradLiteError("method 'ia3' has no use for weight decay, which would draw its scales from 1 to 0; leave it out.")


def lora_as(
    name: str,
    model: nn.Module,
    lr: float,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Modules,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    use_dora: bool = False,
    checkpointing: bool = False,
) -> Method:
    """LoRA for a method called ``name``, which errors name."""
    peft = _import_peft(name)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
        use_dora=use_dora,
    )
    return _adapted(name, model, config, lr, betas, eps, weight_decay, checkpointing)


def _import_peft(method: str) -> Any:
    hold_back_torchao_lines()  # PEFT imports torchao where it is installed
    return require("peft", method, "peft")


def _adapted(
    name: str,
    model: nn.Module,
    config: Any,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    checkpointing: bool,
) -> Method:
    if not isinstance(model, PreTrainedModel):
        raise GradLiteError(f"method {name!r} adapts models of transformers, not {type(model).__name__}.")
    peft = _import_peft(name)
    try:
        with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 under a name that is on its way out
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted = peft.get_peft_model(model, config)
    except ValueError as error:  # such as a module that is not there, or a kind of model that PEFT has no list for
        raise GradLiteError(f"method {name!r} does not fit {type(model).__name__}: {error}") from error
    groups = param_groups([parameter for _, parameter in trainable(adapted)], weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return Method(name, adapted, optimizer, ADAPTER, checkpointing=checkpointing)
