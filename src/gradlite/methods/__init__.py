"""Ways to train, one file each, behind one protocol (:class:`gradlite.methods.method.Method`).

>>> method = gradlite.methods.build("galore", model, lr=1e-4, rank=128)

Importing this module is light: torch, a method's file and its third-party package are loaded when the method is built.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, ValidationError, validate_call

from gradlite.errors import GradLiteError

if TYPE_CHECKING:
    from torch import nn

    from gradlite.methods.method import Method

_HOME = {
    "adamw": "adamw",
    "adamw-checkpointed": "adamw",
    "adamw8bit": "quantised_adamw",
    "adamw4bit": "quantised_adamw",
    "lomo": "lomo",
    "adalomo": "lomo",
    "galore": "galore",
    "fira": "fira",
    "apollo": "apollo",
    "ldadam": "ldadam",
    "badam": "badam",
    "foam": "foam",
    "lora": "adapters",
    "dora": "adapters",
    "ia3": "adapters",
    "mesp": "mesp",
    "mebp": "mebp",
    "mezo": "mezo",
    "gradlite": "attached",
}


SEEDED = ("gradlite", "mesp", "mezo")
"""Methods with an option ``seed``. The others draw from torch's generator, where they draw at all; but apollo-torch seeds its
projections by the parameter's number, so that they are the same in every run."""


def names() -> tuple[str, ...]:
    """All methods that :func:`build` knows."""
    return tuple(_HOME)


def unknown(name: str) -> str | None:
    """A sentence where there is no such method."""
    return None if name in _HOME else f"unknown method {name!r}; {_nearest(name, names())}"


def build(name: str, model: "nn.Module", *, lr: float, **options: Any) -> "Method":
    """The method called ``name`` over ``model``, which it may change in place (attach, wrap, checkpoint).

    It has ``backward(loss)`` (to be called in the place of ``loss.backward()``), ``clip(max_norm)``, ``step()`` and
    ``zero_grad()``: see :mod:`gradlite.methods.method`.

    Every method but gradlite, mesp, mebp and mezo takes ``checkpointing``; the other options and their defaults are told in
    the method's file.

    Raises:
        GradLiteError: an unknown name or option (the nearest is named), a value that is not accepted, a missing package.
    """
    wrong = unknown(name)
    if wrong is not None:
        raise GradLiteError(wrong)
    factory: Callable[..., Method] = getattr(import_module(f"gradlite.methods.{_HOME[name]}"), name.replace("-", "_"))
    parameters = inspect.signature(factory).parameters
    known = [key for key in parameters if key not in ("model", "lr", "options")]
    for option in options:
        if option not in known and "options" not in parameters:
            raise GradLiteError(f"method {name!r} has no option {option!r}; {_nearest(option, known)}")
    checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(factory)
    try:
        return checked(model, lr=lr, **options)
    except ValidationError as error:
        problem = error.errors()[0]
        message = str(problem["msg"]).removeprefix("Input ")
        raise GradLiteError(f"method {name!r}: {problem['loc'][0]} is {problem['input']!r}, but it {message}.") from None


def _nearest(word: str, known: Sequence[str]) -> str:
    guesses = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {guesses[0]!r}?" if guesses else f"known are {', '.join(known)}."
