"""What a key of the settings says of itself beside its type: the group it is shown in, what it accepts, its flag.

Importing this module is light: no torch, no transformers.
"""

import types
import typing
from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo

MODEL_AND_DATA = "Model and data"
GRADLITE = "GradLite"
TRAINING = "Training"
EVALUATION = "Evaluation and saving"
OUTPUT = "Output"
GROUPS = (MODEL_AND_DATA, GRADLITE, TRAINING, EVALUATION, OUTPUT)


def setting(default: Any, group: str, accepts: str, description: str, **limits: Any) -> Any:
    """One key: its default, the group it is shown in, what it accepts ("it must be …"), its help, pydantic's limits."""
    return Field(default, description=description, json_schema_extra={"group": group, "accepts": accepts}, **limits)


def accepted_kinds(field: FieldInfo) -> set[Any]:
    """The types that a key's annotation allows: {int}, {int, float}, {str, NoneType}, {list}, {Literal}, …"""
    annotation = field.annotation
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return {typing.get_origin(member) or member for member in members}


def flag_of(key: str) -> str:
    """The command-line flag of a key: `batch_size` → `--batch-size`."""
    return "--" + key.replace("_", "-")


def group_of(field: FieldInfo) -> str:
    """The group (one of GROUPS) that a key is shown in."""
    return _extra(field, "group")


def accepts_of(field: FieldInfo) -> str:
    """What a key accepts, in words that complete "must be …"."""
    return _extra(field, "accepts")


def _extra(field: FieldInfo, name: str) -> str:
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra[name])
