"""GradLite: full-parameter fine-tuning of language models under tight memory.

The one public door. Importing it starts neither transformers nor CUDA; what it names is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradlite.errors import GradLiteError

if TYPE_CHECKING:
    from gradlite import methods
    from gradlite.attaching import Coverage, attach, detach
    from gradlite.attaching.structured_lora import structured_lora, undo_structured_lora
    from gradlite.methods.gradlite import GradLite, optimizer_factory

__version__ = "0.1.0"

_HOME = {
    "Coverage": "gradlite.attaching",
    "GradLite": "gradlite.methods.gradlite",
    "attach": "gradlite.attaching",
    "detach": "gradlite.attaching",
    "methods": "gradlite",
    "optimizer_factory": "gradlite.methods.gradlite",
    "structured_lora": "gradlite.attaching.structured_lora",
    "undo_structured_lora": "gradlite.attaching.structured_lora",
}

__all__ = [
    "Coverage",
    "GradLite",
    "GradLiteError",
    "attach",
    "detach",
    "methods",
    "optimizer_factory",
    "structured_lora",
    "undo_structured_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradlite' has no attribute {name!r}")
    return import_module("gradlite.methods") if name == "methods" else getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
