"""From rows to examples: which columns hold the question and which the answer, for every layout that is accepted.

| columns | known from | the loss covers |
|---|---|---|
| messages | TRL, chat | the assistant's turns |
| prompt, completion (text or messages) | TRL | the completion |
| instruction, response (context) | Dolly | the response |
| instruction, output (input) | Alpaca | the output |
| question, answer | GSM8K | the answer |
| text | TRL | everything |
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gradlite.errors import GradLiteError
from gradlite.train.sources import Rows

ACCEPTED = (
    "messages; prompt and completion; instruction and response (context optional); "
    "instruction and output (input optional); question and answer; text"
)


@dataclass(frozen=True)
class Text:
    """Plain text; all of it is trained on."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A question and its answer. `separator` stands between them only where the tokenizer has no chat template."""

    prompt: str
    completion: str
    separator: str


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template; the assistant's turns from message number `first_trained` on are trained on."""

    messages: tuple[Mapping[str, Any], ...]
    first_trained: int = 0


Example = Text | Pair | Conversation


@dataclass(frozen=True)
class Parsed:
    """The examples of a data set, the columns they were read from, and how many rows had no question or no answer."""

    examples: list[Example]
    columns: tuple[str, ...]
    num_empty: int


def parse(rows: Rows, name: str) -> Parsed:
    """Turn the rows of the data set called `name` into examples; rows without question or answer are only counted.

    Raises `GradLiteError` where no layout fits the columns, a value is of the wrong type, or no row is left.
    """
    found = _columns(rows)
    columns = _layout(found)
    if columns is None:
        raise GradLiteError(f"dataset {name!r} has the columns {', '.join(found) or '(none)'}, but needs {ACCEPTED}.")
    examples = []
    for number, row in enumerate(rows, start=1):
        example = _example(columns, row, f"row {number} of dataset {name!r}")
        if example is not None:
            examples.append(example)
    if not examples:
        raise GradLiteError(f"no row of dataset {name!r} has anything in its columns {', '.join(columns)}.")
    return Parsed(examples, columns, len(rows) - len(examples))


def _columns(rows: Rows) -> tuple[str, ...]:
    """Every column that some row has: the objects in a JSON file need not all have the same."""
    return tuple(getattr(rows, "column_names", None) or dict.fromkeys(column for row in rows for column in row))


def _layout(found: Iterable[str]) -> tuple[str, ...] | None:
    """The columns to read, or None. Text comes last: Alpaca, for one, also has a column called text."""
    present = set(found)
    for needed, optional in (
        (("messages",), ()),
        (("prompt", "completion"), ()),
        (("instruction", "response"), ("context",)),
        (("instruction", "output"), ("input",)),
        (("question", "answer"), ()),
        (("text",), ()),
    ):
        if present.issuperset(needed):
            return (*needed, *(column for column in optional if column in present))
    return None


def _example(columns: tuple[str, ...], row: Mapping[str, Any], where: str) -> Example | None:
    if columns == ("messages",):
        turns = _messages(row.get("messages"), f"messages in {where}")
        return Conversation(turns) if any(map(says_something, turns)) else None
    if columns == ("text",):
        text = _string(row.get("text"), f"text in {where}")
        return Text(text) if text.strip() else None
    first, second = (row.get(column) for column in columns[:2])
    if isinstance(first, list) or isinstance(second, list):
        return _conversational_pair(first, second, where)
    prompt, completion = (_string(row.get(column), f"{column} in {where}") for column in columns[:2])
    if not prompt.strip() or not completion.strip():
        return None
    if columns == ("prompt", "completion"):
        return Pair(prompt, completion, separator="")
    context = _string(row.get(columns[2]), f"{columns[2]} in {where}") if len(columns) > 2 else ""
    return Pair(f"{prompt}\n\n{context}" if context.strip() else prompt, completion, separator="\n")


def _conversational_pair(prompt: Any, completion: Any, where: str) -> Conversation | None:
    """TRL's prompt and completion as messages; where only one of them is, the other is taken as one message."""
    asked = (
        _messages(prompt, f"prompt in {where}")
        if isinstance(prompt, list)
        else ({"role": "user", "content": _string(prompt, f"prompt in {where}")},)
    )
    told = (
        _messages(completion, f"completion in {where}")
        if isinstance(completion, list)
        else ({"role": "assistant", "content": _string(completion, f"completion in {where}")},)
    )
    if not asked or not any(map(says_something, told)):
        return None
    return Conversation((*asked, *told), first_trained=len(asked))


def _messages(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in value
    ):
        raise GradLiteError(f"{where} is not a list of messages such as {{'role': 'user', 'content': '…'}}.")
    for turn in value:
        if not isinstance(turn.get("content"), str | None):
            raise GradLiteError(f"{where} has a message whose content is not text.")
        _check_encodable(turn.get("content") or "", where)
    return tuple({key: part for key, part in turn.items() if part is not None or key == "content"} for turn in value)


def says_something(turn: Mapping[str, Any]) -> bool:
    """Whether the assistant says something in this turn, or calls a tool: silence is not to be learned."""
    return turn["role"] == "assistant" and bool((turn.get("content") or "").strip() or turn.get("tool_calls"))


def _check_encodable(text: str, where: str) -> None:
    """Half a surrogate pair, such as a cut emoji in scraped JSON, is no character that a tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GradLiteError(
            f"{where} has half a surrogate pair at character {error.start + 1}, as a cut emoji leaves it; remove or replace it."
        ) from None


def _string(value: Any, where: str) -> str:
    if value is None or value != value:  # NaN is how tables say that there is none
        return ""
    if isinstance(value, str):
        _check_encodable(value, where)
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise GradLiteError(f"{where} is {type(value).__name__}, but must be text.")
