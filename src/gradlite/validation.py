"""What pydantic finds wrong, in the words of a user who never heard of pydantic. Importing this module is light."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN_CHARACTERS = 80


def in_words(problem: Mapping[str, Any], place: str, known: Sequence[str] = ()) -> str:
    """One of ``ValidationError.errors()`` as a clause without its end: "rank is 0, but it should be greater than 0".

    ``place``: what the value is called where the user wrote it. ``known``: the keys there are, of which the nearest to one that
    is not among them is named.
    """
    match problem["type"]:
        case "missing" if isinstance(problem["loc"][-1], int):  # of a tuple
            return f"{place} is {shown(problem['input'])}, but it should have more items"
        case "missing":
            return f"{place} is missing"
        case "invalid_key":
            return f"{place} is no text, as keys should be"
        case "extra_forbidden":
            return (
                f"{place} is no known key; {nearest(str(problem['loc'][-1]), known)}" if known else f"{place} is no known key"
            )
        case "value_error":
            reason = str(problem["ctx"]["error"])
            return f"{place}: {reason}" if place else reason
    should = re.sub(r"^(Input|List|String|Value|Dictionary|Tuple) ", "it ", str(problem["msg"]))
    should = re.sub(r", (unable to|got a number) .*$", "", should)
    should = re.sub(r" after validation, not \d+$| or instance of \w+$", "", should).replace("valid dictionary", "mapping")
    return f"{place} is {shown(problem['input'])}, but {should}"


def sentence(clause: str) -> str:
    """With the full stop that a clause lacks; one that ends in a question has its end."""
    return clause if clause.endswith((".", "?")) else f"{clause}."


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that looks most like this one, as a question, or all of them."""
    guesses = difflib.get_close_matches(word.lower(), known, n=3)
    if not guesses:
        return f"known are {', '.join(known)}."

    def likeness(guess: str) -> tuple[float, bool]:
        """Of equally close ones that which begins as the word does: 'adamv' is 'adamw' rather than 'badam'."""
        return difflib.SequenceMatcher(None, word.lower(), guess).ratio(), guess[:1] == word.lower()[:1]

    return f"did you mean {max(guesses, key=likeness)!r}?"


def shown(value: object) -> str:
    """A given value as the user would recognise it, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
