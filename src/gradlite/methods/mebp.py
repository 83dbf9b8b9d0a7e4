"""MeBP: LoRA with every block checkpointed, MeSP's competitor (arXiv 2602.13069): autograd replays each block from its input.

The adapter is PEFT's and trained by AdamW, as in :mod:`gradlite.methods.adapters`. The blocks are Hugging Face's own code; all
that is added is that a block keeps nothing but its input, in memory or in a memory-mapped file.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from gradlite.attaching.blocks import named_blocks
from gradlite.attaching.causal_lm import can_tile_loss
from gradlite.attaching.twins import become_itself, become_recognised
from gradlite.errors import GradLiteError
from gradlite.hold.codec import EXACT
from gradlite.hold.holder import Holder
from gradlite.hold.mapped_file import MappedFile
from gradlite.hold.noise import Noise
from gradlite.hold.place import HERE
from gradlite.hold.shelf import Shelf
from gradlite.methods.adapters import Dropout, Modules, lora_as
from gradlite.methods.method import Betas, Claims, Count, Epsilon, Method, Rate

BlockInputs = Literal["memory", "mapped"]
Loss = Literal["own", "tiled"]


def mebp(
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
    block_inputs: BlockInputs = "memory",
    loss: Loss = "own",
) -> Method:
    """Rank to weight decay as ``lora``'s.

    Args:
        block_inputs: where a block's input waits: in ``memory``, or in a file that is ``mapped`` into it.
        loss: the model's ``own``, whose full logits exist, or ``tiled`` over the vocabulary as MeSP's.
    """
    adapted = lora_as("mebp", model, lr, rank, alpha, dropout, target_modules, betas, eps, weight_decay)
    changed = replay_blocks(adapted.model, block_inputs, loss)
    return CheckpointedBlocks("mebp", adapted.model, adapted.optimizer, adapted.claims, changed)


def replay_blocks(peft_model: Any, block_inputs: BlockInputs, loss: Loss) -> list[nn.Module]:
    """Turns the blocks into replayed ones, and the model into one that tiles its loss if that is wanted; returns all of them.

    Raises:
        GradLiteError: a model without repeated layers, or whose loss cannot be tiled.
    """
    inner: nn.Module = peft_model.get_base_model()
    changed = [block for _, block in named_blocks(inner)]
    if not changed:
        raise GradLiteError(f"method 'mebp' replays repeated layers, and {type(inner).__name__} has none; use method 'lora'.")
    if loss == "tiled" and not can_tile_loss(inner):
        raise GradLiteError(f"the loss of {type(inner).__name__} cannot be tiled; give loss='own'.")
    place = MappedFile() if block_inputs == "mapped" else HERE
    holder = Holder(EXACT, Noise(0), Shelf(), place)
    for block in changed:
        become_recognised(block, "block", None, holder)
    if loss == "tiled":
        become_recognised(inner, "causal_lm", None, holder)
        changed.append(inner)
    return changed


class CheckpointedBlocks(Method):
    """Gives the model its own classes back when it is finished."""

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, claims: Claims, changed: list[nn.Module]) -> None:
        super().__init__(name, model, optimizer, claims)
        self._changed = changed

    def finish(self) -> nn.Module:
        for module in self._changed:
            become_itself(module)
        return super().finish()
