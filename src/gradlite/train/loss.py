"""The loss: per-token cross-entropy over the answer, whose logits alone are computed; and its mean over held-out data.

The model's own head is called (as a module), never its weight matrix. TRL's fused head multiplies by `lm_head.weight`
itself: with an attached head that makes the head's full gradient for a moment in every step, which is what GradLite is
there to avoid, and so TRL's trainer is not used here.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradlite.train.tokens import IGNORED


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy in nats per trained token, over all held-out tokens together (long answers weigh more)."""

    loss: float
    num_tokens: int


def summed_loss(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the labelled tokens of a batch, and their number.

    `inputs["labels"]` (batch × tokens) holds the ids themselves, unshifted, and -100 where the loss does not look.
    Logits are computed for the positions that some row of the batch needs, and made fp32 for the tokens that count.
    """
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


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int,
    device: torch.device,
) -> HeldOutLoss:
    """Evaluate `model` on examples (input_ids and labels), batched by length. Uses no random numbers."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda number: len(examples[number]["input_ids"]))
    total, count = 0.0, 0
    try:
        for start in range(0, len(order), batch_size):
            batch = collate([examples[number] for number in order[start : start + batch_size]])
            on_device = {key: part.to(device) if isinstance(part, Tensor) else part for key, part in batch.items()}
            loss, num_tokens = summed_loss(model, on_device)
            total += float(loss)
            count += int(num_tokens)
    finally:
        model.train(was_training)
    return HeldOutLoss(total / count, count)
