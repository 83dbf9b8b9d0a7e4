"""Data sets of every layout and file type, and what is said about those that cannot be used."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from gradlite.errors import GradLiteError
from gradlite.train.config import TrainConfig
from gradlite.train.data import load_data, sequences
from gradlite.train.formats import Conversation, Pair, Text, parse
from gradlite.train.sources import load_source

Write = Callable[[str, Iterable[Mapping[str, Any]]], Path]
QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
ROWS: list[dict[str, Any]] = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(8)]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"text": "t"}, Text("t")),
        ({"prompt": "q", "completion": "a"}, Pair("q", "a", "")),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, Conversation((QUESTION, ANSWER), 1)),
        ({"prompt": [QUESTION], "completion": "a"}, Conversation((QUESTION, ANSWER), 1)),
        ({"messages": [QUESTION, ANSWER]}, Conversation((QUESTION, ANSWER), 0)),
        ({"instruction": "q", "context": "k", "response": "a", "category": "x"}, Pair("q\n\nk", "a", "\n")),
        ({"instruction": "q", "context": "", "response": "a"}, Pair("q", "a", "\n")),
        ({"instruction": "q", "input": "i", "output": "a", "text": "t"}, Pair("q\n\ni", "a", "\n")),
        ({"instruction": "q", "output": "a"}, Pair("q", "a", "\n")),
        ({"question": "q", "answer": "a"}, Pair("q", "a", "\n")),
    ],
)
def test_every_layout(row: dict[str, Any], example: Any) -> None:
    assert parse([row], "data").examples == [example]


def test_numbers_are_text_and_nan_is_nothing() -> None:
    rows: list[dict[str, Any]] = [{"prompt": 1, "completion": 2.5}, {"prompt": "q", "completion": float("nan")}]
    parsed = parse(rows, "data")
    assert parsed.examples == [Pair("1", "2.5", "")]
    assert parsed.num_empty == 1


def test_silence_is_no_answer() -> None:
    silent = {"role": "assistant", "content": " "}
    called = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    rows = [{"messages": [QUESTION, last]} for last in (silent, called, ANSWER)]
    answers = [example.messages[-1] for example in parse(rows, "data").examples if isinstance(example, Conversation)]
    assert answers == [called, ANSWER]


def test_columns_that_only_some_rows_have() -> None:
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "i", "output": "a"}]
    assert parse(rows, "data").examples == [Pair("q", "a", "\n"), Pair("q\n\ni", "a", "\n")]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "prompt,completion,prompt\na,b,c\n", "the column 'prompt' stands twice"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "prompt": "c"}\n', "line 1 of .* the column 'prompt' stands twice"),
        ("a.json", '[{"prompt": "a", "completion": "b", "prompt": "c"}]', "the column 'prompt' stands twice"),
    ],
)
def test_a_column_that_stands_twice(name: str, text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(GradLiteError, match=sentence):
        load_source(str(tmp_path / name))


@pytest.mark.parametrize("header", ["prompt;completion", "prompt\tcompletion"])
def test_columns_that_commas_do_not_separate(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\na;b\n")
    with pytest.raises(GradLiteError, match=r"separate its columns by commas\.$"):
        load_source(str(tmp_path / "a.csv"))


def test_long_fields_of_csv(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("text\n" + 140_000 * "x" + "\n")
    assert [len(row["text"]) for row in load_source(str(tmp_path / "long.csv")).train] == [140_000]


def test_nobodys_home() -> None:
    with pytest.raises(GradLiteError, match=r"~nosuchuser/x\.jsonl.* does not exist"):
        load_source("~nosuchuser/x.jsonl")


def test_rows_without_an_answer_are_counted() -> None:
    pairs = (("q", "a"), ("q", ""), (None, "a"))
    rows: list[dict[str, Any]] = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    assert parse(rows, "data").num_empty == 2


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"foo": 1, "bar": 2}], "has the columns foo, bar, but needs messages; prompt and completion"),
        ([{"prompt": "q"}], "has the columns prompt, but needs"),
        ([{"prompt": {}, "completion": "a"}], "prompt in row 1 of dataset 'data' is dict"),
        ([{"messages": "hello"}], "messages in row 1 of dataset 'data' is not a list of messages"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "content is not text"),
        ([{"prompt": "", "completion": ""}], "no row"),
        ([{"prompt": "q", "completion": True}], "completion in row 1 of dataset 'data' is bool"),
        (
            [{"prompt": "cut \ud83d", "completion": "a"}],
            "prompt in row 1 .* has half a surrogate pair at character 5",
        ),
        ([{"messages": [{"role": "user", "content": "\ude00"}]}], "messages in row 1 .* has half a surrogate pair"),
    ],
)
def test_unusable_rows(rows: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(GradLiteError, match=sentence):
        parse(rows, "data")


def test_every_file_type(tmp_path: Path, write: Write) -> None:
    lines = write("a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for path in (lines, tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "a.parquet", tmp_path / "saved"):
        source = load_source(str(path))
        assert [dict(row) for row in source.train] == ROWS, path
        assert source.held_out is None


def test_a_directory_with_a_test_file_has_its_own_held_out_rows(tmp_path: Path, write: Write) -> None:
    write("train-00000-of-00002.jsonl", ROWS[:3])
    write("train-00001-of-00002.jsonl", ROWS[3:6])
    write("test.jsonl", ROWS[6:])
    source = load_source(str(tmp_path))
    assert source.train == ROWS[:6]
    assert source.held_out == ROWS[6:]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("bad.jsonl", '{"prompt": "q"}\n{"prompt": \n', "line 2 of dataset .* is not JSON"),
        ("bad.jsonl", "[1]\n", "line 1 of dataset .* is not a JSON object"),
        ("bad.json", '[{"prompt": "q"},\n{"prompt": "q",}]', "line 2 of dataset .* is not JSON"),
        ("bad.json", "{", "line 1 of dataset .* is not JSON"),
        ("bad.csv", "prompt,completion\na,b,c\n", "line 2 of dataset .* has more fields"),
        ("bad.parquet", "no parquet", "cannot read dataset"),
        ("bad.xlsx", "x", "is of no known kind"),
        ("empty.jsonl", "", "has no rows"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(GradLiteError, match=sentence):
        load_source(str(tmp_path / name))


def test_missing_files(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none.jsonl"), "./none", "none.csv"):
        with pytest.raises(GradLiteError, match="does not exist"):
            load_source(name)
    with pytest.raises(GradLiteError, match="holds no jsonl"):
        load_source(str(tmp_path))


def test_a_hub_id_is_asked_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None) -> dict[str, datasets.Dataset]:
        asked.append((name, configuration))
        rows = [{"instruction": "i", "context": "", "response": "r", "category": "c"}] * 3
        return {"train": datasets.Dataset.from_list(rows)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = load_source("databricks/databricks-dolly-15k")
    load_source("openai/gsm8k", "main")
    assert asked == [("databricks/databricks-dolly-15k", None), ("openai/gsm8k", "main")]
    assert parse(source.train, "dolly").examples == [Pair("i", "r", "\n")] * 3


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, configuration: str | None) -> None:
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(GradLiteError, match=r"'owner/data' is neither .* hub: no network$"):
        load_source("owner/data")


def test_configurations(
    monkeypatch: pytest.MonkeyPatch, sums: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A directory with two configurations stands for a data set on the hub, which datasets reads in the same way."""
    folder, original = tmp_path / "gsm8k", datasets.load_dataset
    files = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "socratic")]
    folder.mkdir()
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(files)}---\n")
    for name in ("main", "socratic"):
        (folder / f"{name}.jsonl").write_text('{"question": "q", "answer": "a"}\n')

    def several(_name: str, configuration: str | None) -> Any:
        return original(str(folder), configuration, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", several)
    with pytest.raises(GradLiteError, match=r"'openai/gsm8k' has several .* one of \['main', 'socratic'\] as --dataset-config"):
        load_source("openai/gsm8k")
    assert list(load_source("openai/gsm8k", "socratic").train) == [{"question": "q", "answer": "a"}]
    for name in (str(sums), "python-help"):
        with pytest.raises(GradLiteError, match=r"configurations; leave out --dataset-config\.$"):
            load_data(TrainConfig(dataset=name, dataset_config="main"), tokenizer)


def config(path: Path, **settings: Any) -> TrainConfig:
    return TrainConfig.from_sources(None, {"dataset": str(path), "eval_examples": 2, **settings})


def test_the_held_out_rows_do_not_depend_on_the_seed(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.jsonl", ROWS)
    first, second = (load_data(config(path, seed=seed), tokenizer) for seed in (0, 1))
    assert first.held_out == second.held_out
    assert len(first.held_out) == 2
    assert len(first.train) == 6
    assert not {tuple(tokens.ids) for tokens in first.train} & {tuple(tokens.ids) for tokens in first.held_out}


def test_held_out_rows_are_taken_out_of_training(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path, other = write("a.jsonl", ROWS), write("b.jsonl", ROWS[:2])
    data = load_data(config(path, eval_dataset=str(other)), tokenizer)
    assert len(data.train) == 6
    assert any("word for word" in notice for notice in data.notices)


def test_what_is_cut_and_dropped_is_told(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*ROWS, {"prompt": "long " * 40, "completion": "lost"}, {"prompt": "q", "completion": "long " * 40}]
    data = load_data(config(write("a.jsonl", rows), seq_len=60, eval_dataset=str(write("b.jsonl", ROWS[:1]))), tokenizer)
    assert any("1 examples were dropped" in notice for notice in data.notices)
    assert any("1 examples were cut" in notice for notice in data.notices)


REWRITING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('=>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)


def test_answers_that_the_template_rewrites_are_not_said_to_be_cut(
    write: Write, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", REWRITING)
    turns = [("user", "a"), ("assistant", "x=>b"), ("user", "c")]
    lost = {"messages": [{"role": role, "content": text} for role, text in turns]}
    good = {"messages": lost["messages"][:2]}
    other = str(write("b.jsonl", [good]))
    with pytest.raises(GradLiteError, match=r"template renders every answer differently .* end the conversations") as error:
        load_data(config(write("a.jsonl", [lost, lost]), eval_dataset=other), tokenizer)
    assert "--seq-len" not in str(error.value)
    kept = {"messages": [{"role": "user", "content": "b"}, lost["messages"][1]]}
    notices = load_data(config(write("a.jsonl", [lost, lost, kept]), eval_dataset=other), tokenizer).notices
    assert any("2 examples were dropped: no token of theirs is an answer's" in notice for notice in notices)
    assert not any("cut" in notice for notice in notices)


def test_a_single_row_is_not_enough(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(GradLiteError, match="one row only"):
        load_data(config(write("a.jsonl", ROWS[:1])), tokenizer)


def test_rows_without_an_answer_are_not_drawn(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """Not as the only held-out row either, beside which nothing would be left to evaluate."""
    empty = [{"prompt": "q", "completion": ""}] * 6
    data = load_data(config(write("a.jsonl", [*empty, *ROWS[:2]])), tokenizer)
    assert (len(data.train), len(data.held_out)) == (1, 1)
    assert [notice for notice in data.notices if "without" in notice] == [
        "6 rows without a question or an answer were left out."
    ]
    other = str(write("b.jsonl", [*empty, *ROWS[2:4]]))
    assert len(load_data(config(write("c.jsonl", ROWS[:2]), eval_dataset=other), tokenizer).held_out) == 2


def test_packing_keeps_every_token(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = config(write("a.jsonl", ROWS), seq_len=128, packing=True)
    data = load_data(settings, tokenizer)
    packed = sequences(data.train, settings, packed=True)
    assert len(packed) < len(data.train)
    assert sorted(token for row in packed for token in row["input_ids"]) == sorted(
        token for tokens in data.train for token in tokens.ids
    )


def test_gsm8k_as_it_lies_on_the_hub(shared_data: Path) -> None:
    source = load_source(str(shared_data / "gsm8k"))
    assert source.held_out is not None
    assert (len(source.train), len(source.held_out)) == (7473, 1319)
    assert parse(source.train, "gsm8k").columns == ("question", "answer")
