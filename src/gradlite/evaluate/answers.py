"""What the model answers to a few held-out questions: greedy, so that before and after differ by the training alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gradlite.evaluate.positions import num_positions

NUM_QUESTIONS = 3
MAX_NEW_TOKENS = 60


class Question(Protocol):
    """A question and its right answer as token ids, and the question as it was asked ("" where its tokens say it all)."""

    @property
    def question(self) -> list[int]: ...
    @property
    def answer(self) -> list[int]: ...
    @property
    def asked(self) -> str: ...


@dataclass(frozen=True)
class Answer:
    """A question as the model is given it, what the data answers, and what the model does."""

    question: str
    expected: str
    answer: str

    def as_dict(self) -> dict[str, str]:
        """The same as a record for run.json."""
        return asdict(self)


@torch.no_grad()
def answer_questions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[Answer]:
    """Let the model answer the first few `questions`. Uses no random numbers."""
    was_training = model.training
    model.eval()
    stops = _stop_tokens(model, tokenizer)
    known = num_positions(model)
    settings = GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=next(iter(stops), None) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    generate: Any = model.generate
    answers = []
    try:
        for question in questions[:NUM_QUESTIONS]:
            ids = torch.tensor([question.question], device=model.device)
            room = MAX_NEW_TOKENS if known is None else min(MAX_NEW_TOKENS, known - ids.shape[1])
            output = ids
            if room > 0:
                settings.max_new_tokens = room
                output = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            answers.append(
                Answer(
                    question=question.asked or _readable(tokenizer, question.question),
                    expected=_readable(tokenizer, question.answer),
                    answer=_readable(tokenizer, output[0, ids.shape[1] :].tolist()),
                )
            )
    finally:
        model.train(was_training)
    return answers


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokenizer's end token, and the model's own, which for chat models may be others as well."""
    own = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in found if token is not None))


def _readable(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
