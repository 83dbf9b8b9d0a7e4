"""Third parties' packages, imported when a method is built and not before."""

import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from gradlite.errors import GradLiteError


def require(module: str, method: str, install: str) -> ModuleType:
    """The module; ``install`` is what the user would give to pip. Raises GradLiteError where it is missing or broken."""
    try:
        return import_module(module)
    except ImportError as error:
        raise GradLiteError(
            f"method {method!r} needs a package that cannot be imported ({error}); run `pip install {install}`."
        ) from error


def require_part(package: str, part: str, method: str, install: str) -> ModuleType:
    """One file of a package without its ``__init__.py``, which imports what the file does not need. Raises as :func:`require`.

    galore-torch and apollo-torch import bitsandbytes (125 MB, and a CUDA library at heart) for optimizers that are not used
    here.
    """
    found = find_spec(package)
    if found is None or package in sys.modules:  # missing, or imported already as a whole
        return require(f"{package}.{part}", method, install)
    bare = ModuleType(package)
    bare.__path__ = list(found.submodule_search_locations or ())
    sys.modules[package] = bare
    try:
        return require(f"{package}.{part}", method, install)
    finally:
        del sys.modules[package]  # whoever imports the package later gets the whole of it


def hold_back_torchao_lines() -> None:
    """Keeps the lines off the screen that torchao 0.18 logs when it is imported on torch 2.13.

    Two say that CUDA kernels that nothing here uses could not be loaded, two that torchao registers an enum in an old way.
    transformers imports torchao wherever it is installed, so this is called before transformers is.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (message.startswith("Failed to load ") or "register_constant() on Enum subclasses" in message)
