"""The embedded data set: usable, the same every time, and nothing of the held-out part in the training part."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from gradlite.errors import GradLiteError
from gradlite.train import embedded, python_docs
from gradlite.train.embedded import Row, python_help
from gradlite.train.python_docs import MAX_CHARACTERS, MIN_CHARACTERS, entries, fingerprint, prose


@pytest.fixture(scope="module")
def split() -> tuple[list[Row], list[Row]]:
    return python_help()


def test_there_is_enough_of_it() -> None:
    train, held_out = python_help()
    assert len(train) >= 3000
    assert len(held_out) >= 200


def test_rows_are_filled_and_of_bounded_length(split: tuple[list[Row], list[Row]]) -> None:
    for row in split[0] + split[1]:
        assert row.keys() == {"prompt", "completion", "module"}
        assert row["prompt"].strip() == row["prompt"] != ""
        assert 30 <= len(row["completion"]) <= 800
        assert row["completion"].isascii()


def test_no_module_question_or_answer_is_in_both_parts(split: tuple[list[Row], list[Row]]) -> None:
    train, held_out = split
    for key in ("module", "prompt", "completion"):
        assert not {fingerprint(row[key]) for row in train} & {fingerprint(row[key]) for row in held_out}


def test_no_description_is_in_both_parts(split: tuple[list[Row], list[Row]]) -> None:
    """Also not behind another first line, or as the question of another row."""
    train, held_out = split
    in_train = {fingerprint(text) for row in train for text in row["completion"].split("\n\n")[1:]}
    descriptions = [
        row["completion"].split("\n\n", 1)[1] for row in held_out if row["prompt"].startswith(("What does", "Explain"))
    ]
    assert len(descriptions) > 50
    assert not [text for text in descriptions if fingerprint(text) in in_train]


def test_held_out_is_a_mixture(split: tuple[list[Row], list[Row]]) -> None:
    by_module = Counter(row["module"] for row in split[1])
    assert len(by_module) >= 10
    assert max(by_module.values()) < len(split[1]) / 2


def test_every_question_is_asked_once(split: tuple[list[Row], list[Row]]) -> None:
    prompts = [row["prompt"] for row in split[0] + split[1]]
    assert len(set(prompts)) == len(prompts)


def test_the_rows_do_not_depend_on_the_process(split: tuple[list[Row], list[Row]]) -> None:
    """Neither on its hash seed, nor on what was put into the library's modules (as torch does)."""
    program = (
        "import json, logging; from gradlite.train.embedded import python_help\n"
        "def shout(self):\n    'Log the message in capitals, and twice.'\n"
        "logging.Logger.shout = shout\n"
        "print(json.dumps(python_help()))"
    )
    command = [sys.executable, "-OO", "-W", "error", "-c", program]
    output = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "12345"}, capture_output=True, check=True, text=True)
    assert output.stderr == ""
    train, held_out = json.loads(output.stdout)
    assert (train, held_out) == split


def test_making_it_imports_nothing_of_the_library() -> None:
    program = (
        "import sys; from gradlite.train.embedded import python_help; before = set(sys.modules); python_help();"
        "print(*set(sys.modules) - before)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert len(output.stdout.split()) < 20, output.stdout


def test_reading_the_library_imports_nothing_with_a_side_effect_and_prints_nothing() -> None:
    program = (
        "import runpy, sys; documented = runpy.run_path(sys.argv[1])['entries'](); assert len(documented) > 1000;"
        "forbidden = {'this', 'antigravity', 'idlelib', 'turtle', 'tkinter', 'readline', 'test'} & sys.modules.keys();"
        "assert not forbidden, forbidden"
    )
    command = [sys.executable, "-I", "-W", "error", "-c", program, python_docs.__file__]
    output = subprocess.run(command, capture_output=True, check=True, text=True)
    assert (output.stdout, output.stderr) == ("", "")


def test_descriptions_are_prose_and_signatures_are_stable() -> None:
    for entry in entries():
        assert MIN_CHARACTERS <= len(entry.description) <= MAX_CHARACTERS
        assert ">>>" not in entry.description
        assert " at 0x" not in (entry.signature or "")
        assert entry.signature is None or entry.signature.startswith(entry.name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "f(x, y) -> int\n\nReturn the sum of both\nof the given numbers.",
            "Return the sum of both of the given numbers.",
        ),
        ("Use :func:`~os.walk` or ``os.scandir`` instead of this.", "Use `os.walk` or `os.scandir` instead of this."),
        ("Make a list of all the things.\n\n>>> things()\n[]", "Make a list of all the things."),
        ("Make a list of all the things.\n\n    indented", "Make a list of all the things."),
        ("Make a list of all the things. For example:\n\n    x", "Make a list of all the things."),
        ("The grammar of the statement is this:\n\n    x", "The grammar of the statement is this."),
        ("Make a list of all the things\n\nNew in version 3.9.", "Make a list of all the things."),
        ("Too short.", None),
        ("lower case start is a fragment of something", None),
        ("- a list item that is long enough to count", None),
        ("A sentence. " * 100, " ".join(["A sentence."] * 40)),
        ("word " * 200, None),
    ],
)
def test_prose(text: str, expected: str | None) -> None:
    assert prose(text) == expected


def test_a_signature_that_python_itself_trips_over_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python 3.13.0 does over select.epoll.register's: AttributeError."""

    def trip(_thing: object) -> None:
        raise AttributeError("EPOLLIN")

    monkeypatch.setattr("inspect.signature", trip)
    assert {entry.signature for entry in entries()} == {None}


def test_a_missing_module_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "MODULES", ["textwrap", "no_such_module"])
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert {entry.group for entry in entries()} == {"textwrap"}


def test_a_python_that_documents_too_little_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_documented", lambda: entries()[:10])
    with pytest.raises(GradLiteError, match="documents too little"):
        python_help()


def test_a_python_that_cannot_be_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(GradLiteError, match=r"python-help could not be read from this Python \(/no/such/python\)"):
        python_help()
