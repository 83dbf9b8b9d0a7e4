"""Answers to held-out questions: greedy, short, and the model as it was afterwards."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradlite.evaluate import answers
from gradlite.evaluate.answers import NUM_QUESTIONS, answer_questions


@dataclass(frozen=True)
class Asked:
    question: list[int]
    answer: list[int]
    asked: str


class Numbers:
    """A tokenizer whose tokens are numbers."""

    eos_token_id = None
    pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def endless() -> LlamaForCausalLM:
    """A tiny random model without an end token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_answers_are_greedy_and_questions_are_shown_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 4)
    model = endless().train()
    tokenizer: Any = Numbers()
    asked = [Asked([1, 2, n], [n], "what?" if n == 3 else "") for n in range(3, 4 + NUM_QUESTIONS)]
    given = answer_questions(model, tokenizer, asked)
    assert model.training
    assert [answer.question for answer in given] == ["what?", "1 2 4", "1 2 5"]
    assert [answer.expected for answer in given] == ["3", "4", "5"]
    for question, answer in zip(asked, given, strict=False):
        ids = torch.tensor([question.question])
        for _ in range(4):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert answer.answer == tokenizer.decode(ids[0, 3:].tolist(), skip_special_tokens=True)


@pytest.mark.parametrize(("num_asked", "num_answered"), [(6, 2), (8, 0)])
def test_an_answer_ends_where_the_models_positions_do(num_asked: int, num_answered: int) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, n_positions=8, eos_token_id=None, bos_token_id=None)
    tokenizer: Any = Numbers()
    (given,) = answer_questions(GPT2LMHeadModel(config), tokenizer, [Asked([1] * num_asked, [2], "")])
    assert len(given.answer.split()) == num_answered


@pytest.mark.parametrize("whose", ["tokenizer", "model"])
def test_an_end_token_ends_an_answer(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 4)
    model = endless()
    tokenizer: Any = Numbers()
    asked = [Asked([1, 2, 3], [3], "")]
    (long,) = answer_questions(model, tokenizer, asked)
    first = int(long.answer.split()[0])
    if whose == "model":
        model.generation_config.eos_token_id = [31 if first != 31 else 30, first]
    else:
        monkeypatch.setattr(Numbers, "eos_token_id", first)
    (short,) = answer_questions(model, tokenizer, asked)
    assert len(long.answer.split()) == 4
    assert short.answer == str(first)
