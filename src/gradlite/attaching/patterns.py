"""Patterns (`fnmatch`) on names: a parameter answers to its own name, to its module's, and to those of its tied uses."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """Every parameter's names by its id: ``head.weight``, ``head``, and where it is tied ``embed.weight``, ``embed``."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        names.setdefault(id(parameter), []).extend([name, module] if module else [name])
    return names


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether any of the names fits any of the patterns."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
