"""The held-out loss against the naive one, and what evaluating needs."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlite.evaluate.held_out import held_out_loss

# Texts of different lengths, so that a mean of means would be another number than the mean over all tokens.
EXAMPLES = [{"input_ids": [(7 * n + t) % 10 for t in range(2 + 3 * (n % 4))]} for n in range(7)]


def collate(examples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    rows = [example["input_ids"] + [-100] * (longest - len(example["input_ids"])) for example in examples]
    return {"ids": torch.tensor(rows)}


def bigram_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    assert not model.training
    assert not torch.is_grad_enabled()
    inputs, targets = batch["ids"][:, :-1].clamp_min(0).flatten(), batch["ids"][:, 1:].flatten()
    return F.cross_entropy(model(inputs), targets, reduction="sum"), (targets != -100).sum()


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_held_out_loss_weighs_tokens_not_examples(batch_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(10, 10).double()
    rows = [torch.tensor(example["input_ids"]) for example in EXAMPLES]
    losses = torch.cat([F.cross_entropy(model(row[:-1]), row[1:], reduction="none") for row in rows])
    state = torch.get_rng_state()
    result = held_out_loss(model, EXAMPLES, collate, bigram_loss, batch_size, torch.device("cpu"))
    assert result.num_tokens == len(losses)
    assert result.loss == pytest.approx(losses.mean().item())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluating_needs_nothing_of_training() -> None:
    program = (
        "import sys, gradlite.evaluate.held_out, gradlite.evaluate.answers\n"
        "assert not any(name.startswith(('gradlite.train', 'gradlite.methods', 'trl')) for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
