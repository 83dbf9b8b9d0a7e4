"""From examples to token ids, and to which of them belong to the answer.

With a chat template, a turn of the assistant is found by rendering the conversation up to it (with the generation
prompt) and up to its end: tokens past the first and within the second are the turn's, the end-of-turn token included
and the line break that templates put after it not. This needs no `{% generation %}` markers, so any template will do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gradlite.errors import GradLiteError
from gradlite.train.formats import Conversation, Example, Pair, Text, says_something

IGNORED = -100  # cross-entropy leaves labels of this value out


@dataclass(frozen=True)
class Tokens:
    """One example: its token ids, for each whether it belongs to the answer, and the question ("" for plain text).

    Position 0 is never predicted, whatever `is_answer` says of it.
    """

    ids: list[int]
    is_answer: list[bool]
    asked: str

    @property
    def question(self) -> list[int]:
        """The tokens before the first answer; of plain text, and where no answer is left, the first quarter (1 to 32)."""
        start = self.is_answer.index(True) if True in self.is_answer else 0
        return self.ids[:start] if start else self.ids[: min(32, max(1, len(self.ids) // 4))]

    @property
    def answer(self) -> list[int]:
        """What follows the question, up to the end of the first answer where there is one."""
        rest = self.is_answer[len(self.question) :]
        return self.ids[len(self.question) :][: rest.index(False) if False in rest and True in rest else None]

    def labels(self, train_on: str) -> list[int]:
        """The ids where the loss looks (`train_on`: "answer" or "all"), IGNORED elsewhere."""
        return [
            token if train_on == "all" or answer else IGNORED for token, answer in zip(self.ids, self.is_answer, strict=True)
        ]


@dataclass(frozen=True)
class Tokenized:
    """What became of examples: those kept, and how many were

    - cut and kept (`num_cut`), or dropped because the cut left no answer (`num_cut_off`);
    - dropped because no token of theirs was an answer, however long they may be (`num_unanswered`);
    - bereft of some turns by a template that rewrites them (`num_rewritten`), kept or dropped.
    """

    kept: list[Tokens]
    num_cut: int
    num_cut_off: int
    num_unanswered: int
    num_rewritten: int


def tokenize(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on: str) -> Tokenized:
    """Tokenise examples, cut each to `seq_len` tokens, and drop those that are left with nothing to train on."""
    renderer = _Renderer(tokenizer)
    kept: list[Tokens] = []
    num_cut = num_cut_off = num_unanswered = 0
    for example in examples:
        whole = renderer.tokens(example)
        tokens = Tokens(whole.ids[:seq_len], whole.is_answer[:seq_len], whole.asked)
        if _is_trainable(tokens, train_on):
            kept.append(tokens)
            num_cut += len(whole.ids) > seq_len
        elif _is_trainable(whole, train_on):
            num_cut_off += 1
        else:
            num_unanswered += 1
    return Tokenized(kept, num_cut, num_cut_off, num_unanswered, renderer.num_rewritten)


def _is_trainable(tokens: Tokens, train_on: str) -> bool:
    return len(tokens.ids) > 1 if train_on == "all" else any(tokens.is_answer[1:])


class _Renderer:
    """Turns one example at a time into tokens with one tokenizer, by its chat template where it has one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self.special_ids = set(tokenizer.all_special_ids)
        self.num_rewritten = 0  # conversations whose earlier turns the template renders differently later on

    def tokens(self, example: Example) -> Tokens:
        if isinstance(example, Text):
            ids = self._ended_ids(example.text)
            return Tokens(ids, [True] * len(ids), asked="")
        if isinstance(example, Conversation):
            return self._conversation(example)
        if self.has_template:
            turns = (
                {"role": "user", "content": example.prompt},
                {"role": "assistant", "content": example.completion.strip()},
            )
            return self._conversation(Conversation(turns, first_trained=1))
        return self._pair(example)

    def _pair(self, pair: Pair) -> Tokens:
        prompt = pair.prompt + pair.separator
        ids = self._ended_ids(prompt + pair.completion)
        start = _num_shared(self._prefix_ids(prompt), ids)
        return Tokens(ids, [position >= start for position in range(len(ids))], asked=pair.prompt)

    def _conversation(self, conversation: Conversation) -> Tokens:
        if not self.has_template:
            raise GradLiteError(
                "the data holds conversations, but the model's tokenizer has no chat template; "
                "use an instruction-tuned model, or data with prompt and completion as text."
            )
        messages = conversation.messages
        text = self._render(messages)
        ids = self._ids(text, add_special_tokens=False)
        is_answer = [False] * len(ids)
        turns = range(max(1, conversation.first_trained), len(messages))
        trained = [number for number in turns if says_something(messages[number])]
        rewritten = False
        for number in trained:
            end_text = text if number == len(messages) - 1 else self._render(messages[: number + 1])
            if not text.startswith(end_text.rstrip()):
                rewritten = True  # such as reasoning, which some templates keep in the last turn only
                continue
            start_text = _shared_prefix(self._render(messages[:number], answer_next=True), end_text)
            if not start_text.startswith(self._render(messages[:number]).rstrip()):
                rewritten = True
                continue
            start = _num_shared(self._ids(start_text, add_special_tokens=False), ids)
            end = len(ids) if end_text is text else _num_shared(self._ids(end_text, add_special_tokens=False), ids)
            for position in range(start, self._without_line_break(ids, start, end)):
                is_answer[position] = True
        self.num_rewritten += rewritten
        asked = str(messages[trained[0] - 1].get("content") or "") if trained else ""
        return Tokens(ids, is_answer, asked)

    def _without_line_break(self, ids: list[int], start: int, end: int) -> int:
        """Where a turn ends: after its last special token (end of turn) if only white space follows, else at `end`."""
        for position in range(end - 1, start, -1):
            if ids[position] in self.special_ids:
                return position + 1
            if str(self.tokenizer.decode([ids[position]])).strip():
                break
        return end

    def _render(self, messages: Sequence[Mapping[str, Any]], answer_next: bool = False) -> str:
        """The conversation as text; with `answer_next`, up to where the assistant begins to speak."""
        turns: Any = list(messages)
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next))
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise GradLiteError(f"the model's chat template does not take turns of {roles}: {error}") from error

    def _ended_ids(self, text: str) -> list[int]:
        """Ids of a text with one end token, whether or not the text or the tokenizer brings its own."""
        ids, eos = self._ids(text), self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _prefix_ids(self, text: str) -> list[int]:
        """Ids of the beginning of a longer text: without the end token that some tokenizers add by themselves."""
        ids, eos = self._ids(text), self.tokenizer.eos_token
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(str(eos))
        return ids[:-1] if ended else ids


def _shared_prefix(first: str, second: str) -> str:
    """The longest text that two texts begin with."""
    return first[: _num_shared(first, second)]


def _num_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """How many ids or characters two sequences share at their beginning: of ids fewer than the first's where a token spans the
    border.
    """
    count = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        count += 1
    return count
