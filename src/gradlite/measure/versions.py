"""What a measurement's figures depend on besides the machine: the software."""

import contextlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import gradlite

_PACKAGES = (
    "torch", "transformers", "trl", "peft", "torchao", "bitsandbytes", "triton", "lomo-optim", "galore-torch",
    "fira", "apollo-torch", "badam", "ista-daslab-optimizers",
)  # fmt: skip


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Of Python, of GradLite, and of ``packages`` (by default every one that a method may use), where installed."""
    found = {"python": platform.python_version(), "gradlite-llm": gradlite.__version__}  # the source may not be installed
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
