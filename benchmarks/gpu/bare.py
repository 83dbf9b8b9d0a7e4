"""What lets GradLite's source be imported where nothing but torch and transformers is installed.

    sys.path needs src/ (``PYTHONPATH=src``).

gradlite.methods checks the options of a method with pydantic, which neither torch nor transformers brings. Where it is
missing, a stand-in takes its place while gradlite's modules are imported: options are then not checked, and nothing else
changes. It is gone afterwards, so that transformers does not find it.
"""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_METHODS = ("", ".method", ".packages", ".adamw", ".attached", ".galore", ".lomo", ".quantised_adamw")
_MODULES = ("gradlite.train.files", "gradlite.train.out_of_memory", *(f"gradlite.methods{name}" for name in _METHODS))


def import_gradlite() -> None:
    """Imports what the benchmark needs of gradlite, with pydantic or without; to be called before transformers is imported."""
    is_missing = find_spec("pydantic") is None
    if is_missing:
        sys.modules["pydantic"] = _stand_in()
    try:
        for name in _MODULES:
            importlib.import_module(name)
    finally:
        if is_missing:
            del sys.modules["pydantic"]


def _stand_in() -> ModuleType:
    module: Any = ModuleType("pydantic")
    module.ConfigDict = dict
    module.Field = lambda **_: None
    module.ValidationError = type("ValidationError", (Exception,), {})
    module.validate_call = lambda **_: lambda function: function
    module.create_model = None  # of what a comparison's runner asks before its first run, which is not used here
    return module
