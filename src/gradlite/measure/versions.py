"""What a measurement's figures depend on besides the machine: the software."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

import gradlite

_PACKAGES = (
    "torch", "transformers", "trl", "peft", "torchao", "bitsandbytes", "triton", "lomo-optim", "galore-torch",
    "fira", "apollo-torch", "badam", "ista-daslab-optimizers",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and of every package that a method may use, where installed."""
    found = {"python": platform.python_version(), "gradlite-llm": gradlite.__version__}  # the source may not be installed
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
