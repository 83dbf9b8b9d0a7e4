"""Flags made from `TrainConfig`'s fields, so that flag and key can never drift apart.

A flag carries text only: `TrainConfig` reads it exactly as it reads a YAML file's value, so both are told the same way
what is wrong with them. A flag that was not given is left out, and the config file's value, or the default, holds.
"""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from gradlite.errors import GradLiteError
from gradlite.train.config import TrainConfig, nearest_key
from gradlite.train.fields import GROUPS, accepted_kinds, flag_of, group_of

# Options that no flag of ours is are kept for `refuse_leftovers`, which suggests the nearest one.
KEEP_UNKNOWN = {"ignore_unknown_options": True, "allow_extra_args": True}


def with_config_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """Give `verb(context, config, **flags)` one flag for each key of TrainConfig, grouped as the fields are.

    `verb` keeps its own parameters; its `**flags` is replaced by the keys, each None unless given.
    """
    own = [p for p in inspect.signature(verb).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    by_group = sorted(TrainConfig.model_fields.items(), key=lambda item: GROUPS.index(group_of(item[1])))
    parameters = own + [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(key, field))
        for key, field in by_group
    ]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return verb


def given(flags: Mapping[str, object]) -> dict[str, object]:
    """Only the flags that stood on the command line."""
    return {key: value for key, value in flags.items() if value is not None and value != []}


def refuse_leftovers(arguments: Sequence[str]) -> None:
    """Raise GradLiteError for the first argument that is no known flag, naming the flag that looks most like it."""
    if not arguments:
        return
    flag = arguments[0].split("=")[0]
    if not flag.startswith("-"):
        raise GradLiteError(f"unexpected argument {flag!r}; settings are given as flags such as --model {flag}.")
    key = nearest_key(flag.lstrip("-"))
    hint = f"did you mean {flag_of(key)}?" if key else "`gradlite train --help` lists the known flags."
    raise GradLiteError(f"unknown flag {flag}; {hint}")


def _option(key: str, field: FieldInfo) -> Any:
    """What makes Typer parse one key's flag as text (a truth value: --key/--no-key; a list: repeatable)."""
    flag = flag_of(key)
    kinds = accepted_kinds(field)
    declaration = f"{flag}/--no-{flag[2:]}" if bool in kinds else flag
    kind: Any = bool if bool in kinds else list[str] if list in kinds else str
    option = typer.Option(
        declaration,
        help=_help(key, field),
        metavar="" if bool in kinds else _metavar(field),
        rich_help_panel=group_of(field),
        show_default=False,
    )
    return Annotated[kind | None, option]


def _metavar(field: FieldInfo) -> str:
    """What stands for the value in --help: the kind of value."""
    kinds = accepted_kinds(field)
    if _choices(field.annotation):
        return "CHOICE"
    if tuple in kinds:
        return "NUMBERS"
    if Path in kinds:
        return "PATH"
    return "NUMBER" if float in kinds else "INTEGER" if int in kinds else "TEXT"


def _choices(annotation: Any) -> tuple[str, ...]:
    """The strings of a Literal, also of one inside a list."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    inner = typing.get_args(annotation) if typing.get_origin(annotation) is list else ()
    return _choices(inner[0]) if inner else ()


def _help(key: str, field: FieldInfo) -> str:
    """A key's description; in brackets its choices and its default."""
    notes = [", ".join(_choices(field.annotation)), _default_text(key)]
    return f"{field.description} ({'; '.join(filter(None, notes))})" if any(notes) else f"{field.description}"


def _default_text(key: str) -> str:
    """The default as the user would type it; nothing for none and for an empty list."""
    value = TrainConfig().settings()[key]
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "default: on" if value else "default: off"
    return "default: " + (",".join(map(str, value)) if isinstance(value, list) else str(value))
