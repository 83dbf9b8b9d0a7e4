"""The embedded data set `python-help`: questions about Python, answered from what every Python ships.

Each thing that `python_docs` describes becomes one question "what is this?" and, for some, further questions (its
signature, where it lives, what it is called, its members). All answers keep one style: what the thing is, then its
description.
"""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

from gradlite.errors import GradLiteError
from gradlite.train import python_docs
from gradlite.train.python_docs import Entry, fingerprint

HELD_OUT_SHARE = 1 / 10
MIN_ROWS = 500
MAX_MEMBERS = 12

Row = dict[str, str]

_ASK_WHAT = {
    "module": ("What is the Python module `{}` for?", "Describe the module `{}` of Python's standard library."),
    "function": (
        "What does `{}` do in Python?",
        "Explain the Python function `{}`.",
        "I found a call of `{}`. What is it for?",
    ),
    "class": (
        "What is the Python class `{}`?",
        "Explain the class `{}` in Python.",
        "What would I use `{}` for in Python?",
    ),
    "method": ("What does `{}` do in Python?", "Explain the method `{}`.", "When would I call `{}`?"),
    "topic": ("Explain this part of the Python language: {}.", "What does Python's documentation say about: {}?"),
}
_ASK_CALL = ("Show the signature of `{}`.", "How do I call `{}`?", "Which arguments does `{}` take?")
_ASK_NAME = ("Which {} in Python fits this description? {}", "What is the name of the Python {} described here? {}")
_ASK_WHERE = ("Which Python module provides `{}`?", "From where do I import `{}` in Python?")
_ASK_MEMBERS = {
    "module": ("Which functions does the module `{}` offer?",),
    "class": ("Which methods does the class `{}` define?",),
}


def python_help() -> tuple[list[Row], list[Row]]:
    """The data set: (train, held-out), each row {"prompt", "completion", "module"}; the same rows in the same order
    every time.

    It is split by module ("module" holds the top-level module, or the help topic): no held-out module, and no held-out
    answer, occurs in train. Takes about a second. Raises GradLiteError if this Python cannot be run afresh or has
    hardly any docstrings.
    """
    rows = sorted(_rows(_documented()), key=lambda row: _number(row["prompt"], "order"))
    train = [row for row in rows if not _is_held_out(row["module"])]
    if len(train) < MIN_ROWS:
        raise GradLiteError(f"this Python documents too little of itself for the data set python-help: {len(train)} rows.")
    known = {fingerprint(row["completion"]) for row in train}
    return train, [row for row in rows if _is_held_out(row["module"]) and fingerprint(row["completion"]) not in known]


def _documented() -> list[Entry]:
    """`python_docs.entries()` of a fresh, isolated interpreter: the same whatever this one has imported."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", python_docs.__file__]
    try:
        output = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise GradLiteError(f"python-help could not be read from this Python ({sys.executable}): {error}.") from error
    return [Entry(**{**entry, "members": tuple(entry["members"])}) for entry in json.loads(output)]


def _number(text: str, purpose: str) -> float:
    """A number from 0 to below 1 that depends on the text alone, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{text}".encode()).digest()[:6]) / 2**48


def _is_held_out(module: str) -> bool:
    return _number(module, "evaluation") < HELD_OUT_SHARE


def _rows(documented: list[Entry]) -> Iterator[Row]:
    """All rows, each question once; a question that two things would answer differently is not asked."""
    asked = [(question, answer, entry.group) for entry in documented for question, answer in _questions(entry)]
    times = Counter(question for question, _, _ in asked)
    for question, answer, group in asked:
        if times[question] == 1:
            yield {"prompt": question, "completion": answer, "module": group}


def _questions(entry: Entry) -> Iterator[tuple[str, str]]:
    """(question, answer) pairs about one thing. "What is it?" always; the others for a fixed share of the things."""
    chance = _number(entry.name, "questions")
    yield _pick(_ASK_WHAT[entry.kind], entry).format(entry.name), f"{_what_it_is(entry)}\n\n{entry.description}"
    if entry.members and len(entry.members) <= MAX_MEMBERS and entry.kind in _ASK_MEMBERS:
        listed = "\n".join(f"- `{member}`" for member in entry.members)
        noun = "functions" if entry.kind == "module" else "methods"
        yield _pick(_ASK_MEMBERS[entry.kind], entry).format(entry.name), f"`{entry.name}` has these {noun}:\n\n{listed}"
    if entry.kind in {"module", "topic"}:
        return
    module, _, short_name = entry.name.rpartition(".")
    if entry.signature and chance < 0.25:
        yield (
            _pick(_ASK_CALL, entry).format(entry.name),
            f"It is called like this:\n\n```python\n{entry.signature}\n```",
        )
    elif chance < 0.45:
        first_sentence = entry.description.split("\n\n")[0]
        yield (
            _pick(_ASK_NAME, entry).format(entry.kind, first_sentence),
            f"That would be `{entry.name}`.\n\n{_what_it_is(entry)}",
        )
    elif module and entry.kind != "method" and chance < 0.7:
        import_line = f"from {module} import {short_name}"
        answer = f"`{short_name}` is in the module `{module}`. Import it like this:\n\n```python\n{import_line}\n```"
        yield _pick(_ASK_WHERE, entry).format(short_name), answer


def _what_it_is(entry: Entry) -> str:
    """The sentence that an answer begins with: what kind of thing this is, how it is called, and where it lives."""
    if entry.kind == "topic":
        return f"{entry.name} is a topic of the Python language."
    if entry.kind == "module":
        return f"`{entry.name}` is a module of Python's standard library."
    owner = entry.name.rpartition(".")[0]
    place = f"of the {'class' if entry.kind == 'method' else 'module'} `{owner}`" if owner else "built into Python"
    return f"`{entry.signature or entry.name}` is a {entry.kind} {place}."


def _pick(templates: tuple[str, ...], entry: Entry) -> str:
    return templates[int(_number(entry.name, templates[0]) * len(templates))]
