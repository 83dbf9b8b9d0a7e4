"""What a run trains on and is judged on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gradlite.compare.rows import TokenRow, prepare
from gradlite.compare.runs import RunSpec
from gradlite.errors import GradLiteError
from gradlite.train.tokens import IGNORED

MakeSpec = Callable[..., RunSpec]


def texts(rows: list[TokenRow], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(row["input_ids"])) for row in rows]


def asked(text: str) -> int:
    return int(text.split("user\n")[1].split(" ")[0])


def test_the_last_rows_are_for_evaluation_alone(make_spec: MakeSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    work = prepare(make_spec(steps=40), tokenizer)
    trained = [asked(text) for step in work.steps for text in texts(step, tokenizer)]
    held_out = [asked(text) for text in texts(work.held_out, tokenizer)]
    assert set(trained) == set(range(30))
    assert len(held_out) == 4
    assert set(held_out) <= set(range(30, 40))
    assert [len(step) for step in work.steps] == [2] * 40
    assert len(set(trained[:30])) == 30  # every row once before any comes again


def test_the_seed_decides_the_order_and_nothing_else(make_spec: MakeSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    first = prepare(make_spec(seed=0, method="lora"), tokenizer)
    assert prepare(make_spec(seed=0), tokenizer) == first
    other = prepare(make_spec(seed=1), tokenizer)
    assert other.steps != first.steps
    assert other.held_out == first.held_out


def test_the_loss_covers_the_answer(make_spec: MakeSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    row = prepare(make_spec(), tokenizer).held_out[0]
    answer = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert "yes" in answer
    assert "and" not in answer


def test_full_rows_fill_the_length(make_spec: MakeSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = {len(row["input_ids"]) for step in prepare(make_spec(), tokenizer).steps for row in step}
    full = prepare(make_spec(full_rows=True, seq_len=sorted(lengths)[1]), tokenizer)
    assert len(lengths) > 1
    assert {len(row["input_ids"]) for step in full.steps for row in step} == {sorted(lengths)[1]}


def test_what_is_left_out_is_told(make_spec: MakeSpec, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert prepare(make_spec(), tokenizer).notices == []

    def row(number: int) -> dict[str, str]:
        question = f"{number} and 1 " * (40 if number % 5 == 0 else 1)  # of which no answer is left within 96 tokens
        return {"prompt": question, "completion": "" if number % 5 == 1 else "yes"}

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(40)))
    work = prepare(make_spec(dataset=str(file), held_out_rows=10, steps=40), tokenizer)
    assert len(work.held_out) == 6
    assert work.notices == [
        "6 training rows without a question or an answer were left out.",
        "6 training rows have no answer within 96 tokens and were passed over.",
        "2 held-out rows without a question or an answer are not evaluated.",
        "2 held-out rows have no answer within 96 tokens and are not evaluated.",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"held_out_from_last": 40}, "has 40 rows, and held_out_from_last puts 40 aside"),
        ({"seq_len": 96, "full_rows": True}, "no training row of .* fills 96 tokens"),
        ({"seq_len": 4}, "no held-out row of .* has an answer within 4 tokens"),
        ({"dataset": "nowhere.jsonl"}, "does not exist"),
    ],
)
def test_too_little_data_is_told(
    make_spec: MakeSpec, tokenizer: PreTrainedTokenizerFast, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(GradLiteError, match=sentence):
        prepare(make_spec(**changes), tokenizer)
