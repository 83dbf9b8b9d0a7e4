"""Ways to train, one file each, behind one protocol (:class:`gradlite.methods.method.Method`).

>>> method = gradlite.methods.build("galore", model, lr=1e-4, rank=128)

Importing this module is light: torch, a method's file and its third-party package are loaded when the method is built.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model, validate_call

from gradlite.errors import GradLiteError
from gradlite.methods.packages import hold_back_torchao_lines
from gradlite.validation import in_words, nearest, sentence, shown

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


_NO_OPTIONS = ("self", "model", "lr")
_ANY_TYPE = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

SEEDED = ("gradlite", "mesp", "mezo")
"""Methods with an option ``seed``. The others draw from torch's generator, where they draw at all; but apollo-torch seeds its
projections by the parameter's number, so that they are the same in every run."""


def names() -> tuple[str, ...]:
    """All methods that :func:`build` knows."""
    return tuple(_HOME)


def unknown(name: str) -> str | None:
    """A sentence where there is no such method."""
    return None if name in _HOME else f"unknown method {name!r}; {nearest(name, names())}"


def build(name: str, model: "nn.Module", *, lr: float, **options: Any) -> "Method":
    """The method called ``name`` over ``model``, which it may change in place (attach, wrap, checkpoint).

    It has ``backward(loss)`` (to be called in the place of ``loss.backward()``), ``clip(max_norm)``, ``step()`` and
    ``zero_grad()``: see :mod:`gradlite.methods.method`.

    Every method but gradlite, mesp, mebp and mezo takes ``checkpointing``; the other options and their defaults are told in
    the method's file.

    Raises:
        GradLiteError: an unknown name or option (the nearest is named), a value that is not accepted, a missing package, a
            model that GradLite is attached to (only gradlite itself takes one, and attaches anew).
    """
    factory = _factory(name)
    _check_model(name, model)
    if "options" not in inspect.signature(factory).parameters:
        _check_names(name, options, _known(factory))
    checked = validate_call(config=_ANY_TYPE)(factory)
    try:
        return checked(model, lr=lr, **options)
    except ValidationError as error:
        raise _not_accepted(name, error) from None


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """What :func:`build` would refuse of these options without a look at the model: names, types and ranges.

    Raises:
        GradLiteError: as :func:`build`.
    """
    factory = _factory(name)
    module = sys.modules[factory.__module__]
    declared = getattr(module, "DECLARED", factory)  # where the factory itself takes anything and hands it on
    _check_names(name, options, _known(declared))
    hints = get_type_hints(declared, include_extras=True)
    fields: dict[str, Any] = {option: (hints[option], ...) for option in options}
    try:
        create_model("Options", __config__=_ANY_TYPE, **fields).model_validate(dict(options))
    except ValidationError as error:
        raise _not_accepted(name, error) from None
    further: Callable[[str, Mapping[str, Any]], None] | None = getattr(module, "check_further", None)
    if further is not None:
        further(name, options)


def _factory(name: str) -> "Callable[..., Method]":
    wrong = unknown(name)
    if wrong is not None:
        raise GradLiteError(wrong)
    hold_back_torchao_lines()  # some of the files bring transformers
    factory: Callable[..., Method] = getattr(import_module(f"gradlite.methods.{_HOME[name]}"), name.replace("-", "_"))
    return factory


def _check_model(name: str, model: object) -> None:
    from torch import nn  # which the factory has brought already

    from gradlite.attaching.attachment import attachment_of

    if not isinstance(model, nn.Module):
        raise GradLiteError(f"method {name!r} needs a model (torch.nn.Module), not {shown(model)}.")
    if name != "gradlite" and attachment_of(model) is not None:
        raise GradLiteError(
            f"method {name!r} cannot train a model that GradLite is attached to; call gradlite.detach(model) first."
        )


def _known(factory: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(factory).parameters.values()
    return [one.name for one in parameters if one.name not in _NO_OPTIONS and one.kind is not one.VAR_KEYWORD]


def _check_names(name: str, options: Iterable[str], known: Sequence[str]) -> None:
    for option in options:
        if option not in known:
            raise GradLiteError(f"method {name!r} has no option {option!r}; {nearest(str(option), known)}")


def _not_accepted(name: str, error: ValidationError) -> GradLiteError:
    problem = error.errors()[0]
    return GradLiteError(sentence(f"method {name!r}: {in_words(problem, str(problem['loc'][0]))}"))
