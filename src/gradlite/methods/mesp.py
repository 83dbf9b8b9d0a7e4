"""MeSP: LoRA whose backward pass is written out by hand and keeps a block's input only (arXiv 2602.13069).

The adapter is PEFT's and trained by AdamW, as in :mod:`gradlite.methods.adapters`; the model is
:func:`gradlite.structured_lora`'s. Gradients equal those of plain LoRA.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from gradlite.attaching.holding import Hold
from gradlite.attaching.structured_lora import Base, Inputs, noise_of, structured_lora, undo_structured_lora
from gradlite.methods.adapters import Dropout, Modules, lora_as
from gradlite.methods.method import Betas, Count, Epsilon, Method, Rate


def mesp(
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
    hold: Hold = "recompute",
    base: Base = "as it is",
    store_h: bool = False,
    inputs: Inputs = "every block",
    seed: int = 0,
) -> Method:
    """Rank to weight decay as ``lora``'s; the others are those of :func:`gradlite.structured_lora`."""
    adapted = lora_as("mesp", model, lr, rank, alpha, dropout, target_modules, betas, eps, weight_decay)
    structured_lora(adapted.model, hold, base=base, store_h=store_h, inputs=inputs, seed=seed)
    return StructuredLoraMethod("mesp", adapted.model, adapted.optimizer, adapted.claims)


class StructuredLoraMethod(Method):
    """Saves the place in the noise that rounds held tensors; gives the model its own classes back when it is finished."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "noise_reads": noise_of(self.model).reads}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        noise_of(self.model).reads = int(state.get("noise_reads", 0))  # states of before have none

    def finish(self) -> nn.Module:
        return undo_structured_lora(super().finish())
