"""Read a YAML file that must hold one mapping; every way in which that fails is told in one sentence."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from gradlite.errors import GradLiteError


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice is an error instead of the last one silently winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's top-level mapping. Raises `GradLiteError` if it is missing, unreadable, not YAML, or not a mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except OSError as error:
        raise GradLiteError(f"the config file {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise GradLiteError(f"the config file {path} is not UTF-8 text.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise GradLiteError(f"the config file {path} is not valid YAML: {_problem(error)}.") from None
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise GradLiteError(f"the config file {path} must hold lines of the form 'key: value', but it is {found}.")
    return content


def _problem(error: Exception) -> str:
    """What PyYAML found, and the line, without its multi-line excerpt."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
