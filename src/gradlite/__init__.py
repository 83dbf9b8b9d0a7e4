"""GradLite: full-parameter fine-tuning of language models under tight memory.

The one public door. Importing it starts neither transformers nor CUDA; what it names is loaded on first use.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradlite.errors import GradLiteError

if TYPE_CHECKING:
    from gradlite.attach import Coverage, attach, detach
    from gradlite.methods.gradlite import GradLite, optimizer_factory

__version__ = "0.1.0"

_HOME = {
    "Coverage": "gradlite.attach",
    "GradLite": "gradlite.methods.gradlite",
    "attach": "gradlite.attach",
    "detach": "gradlite.attach",
    "optimizer_factory": "gradlite.methods.gradlite",
}

__all__ = ["Coverage", "GradLite", "GradLiteError", "attach", "detach", "optimizer_factory"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradlite' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _Door(ModuleType):
    """Keeps ``gradlite.attach`` the function: importing the package of that name would put the package in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door
