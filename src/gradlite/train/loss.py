"""The loss: per-token cross-entropy over the answer, in tiles of the vocabulary head where the attached model offers that.

Otherwise the model's own head is called (as a module), for the answer's positions, and never its weight matrix. TRL's
fused head multiplies by `lm_head.weight` itself: with an attached head that makes the head's full gradient for a moment
in every step, which is what GradLite is there to avoid, and so TRL's trainer is not used here.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from gradlite.attaching import tiles_its_loss
from gradlite.train.tokens import IGNORED


def summed_loss(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the labelled tokens of a batch, and their number. Routers' balancing losses are left out.

    `inputs["labels"]` (batch × tokens) holds the ids themselves, unshifted, and -100 where the loss does not look.
    Logits exist a tile at a time, or else for the positions that some row of the batch needs.
    """
    if tiles_its_loss(model):
        num_tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        balancing = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
        return model(**inputs, **balancing, use_cache=False, num_items_in_batch=1).loss, num_tokens
    others = {key: value for key, value in inputs.items() if key != "labels"}
    next_tokens = inputs["labels"][:, 1:]
    is_labelled = next_tokens != IGNORED
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        positions = is_labelled.any(dim=0).nonzero().squeeze(1)
        logits = model(**others, use_cache=False, logits_to_keep=positions).logits
        next_tokens, is_labelled = next_tokens[:, positions], is_labelled[:, positions]
    else:
        logits = model(**others, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(logits[is_labelled].float(), next_tokens[is_labelled], reduction="sum")
    return loss, is_labelled.sum()
