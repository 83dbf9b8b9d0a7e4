"""The loss against the naive one: all logits, each example by itself."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gradlite.train.config import TrainConfig
from gradlite.train.data import sequences
from gradlite.train.formats import Pair
from gradlite.train.loss import summed_loss
from gradlite.train.tokens import Tokens, tokenize


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Seven examples whose questions and answers differ in length, so that a mean of means would be another number."""
    pairs = [Pair("q" * (3 * n + 1), "answer " * (n % 4 + 1), "") for n in range(7)]
    return tokenize(pairs, tokenizer, 128, "answer").kept


@pytest.fixture(scope="module")
def naive(model: PreTrainedModel, examples: list[Tokens]) -> tuple[float, int]:
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens in examples:
            labels = torch.tensor(tokens.labels("answer")[1:])
            logits = model(torch.tensor([tokens.ids])).logits[0, :-1].float()
            total += float(functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    return total, count


@pytest.mark.parametrize("packed", [False, True])
def test_a_padded_and_a_packed_batch_give_the_sum_of_their_examples(
    model: PreTrainedModel, examples: list[Tokens], naive: tuple[float, int], packed: bool
) -> None:
    rows = sequences(examples, TrainConfig(seq_len=256), packed=packed)
    assert (len(rows) < len(examples)) is packed
    with torch.no_grad():
        loss, count = summed_loss(model, DataCollatorForLanguageModeling(0, padding_free=packed)(list(rows)))
    assert int(count) == naive[1]
    assert float(loss) == pytest.approx(naive[0], rel=1e-5)


def test_the_gradient_is_that_of_the_naive_loss(model: PreTrainedModel, examples: list[Tokens]) -> None:
    batch = DataCollatorForLanguageModeling(0)(list(sequences(examples, TrainConfig(), packed=False)))
    summed_loss(model, batch)[0].backward()
    ours = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    theirs = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
