"""The mean loss over held-out data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradlite.errors import GradLiteError

SummedLoss = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy in nats per trained token, over all held-out tokens together (long answers weigh more)."""

    loss: float
    num_tokens: int


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    summed_loss: SummedLoss,
    batch_size: int,
    device: torch.device,
) -> HeldOutLoss:
    """Evaluate `model` on examples (input_ids and labels), batched by length. Uses no random numbers.

    Raises GradLiteError where no token counts.

    `summed_loss` is the loss of one batch, summed over its tokens that count, and their number.
    """
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
    if not count:
        raise GradLiteError("no held-out token counts for the loss; give rows with an answer.")
    return HeldOutLoss(total / count, count)
