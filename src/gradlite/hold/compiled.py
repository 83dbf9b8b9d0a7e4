"""Elementwise kernels through torch.compile, and eager PyTorch where that does not work.

Compiled, a codec costs about a nanosecond an element; in eager mode about ten times that, for every step of it is a pass over
memory. Rows (tokens) are a dynamic size: batches of other lengths use the same kernel.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT_SWITCH = "GRADLITE_COMPILE"
"""Set to 0 to run in eager mode, for debugging."""

SMALL = 1 << 14
"""Work on fewer elements runs eagerly: compiling takes seconds."""


class _State:
    usable = os.environ.get(ENVIRONMENT_SWITCH, "1") != "0"


def is_compiling_enabled() -> bool:
    """Whether kernels are compiled; False once a compilation has failed."""
    return _State.usable


class Kernel:
    """A pure function of tensors, compiled once for each family of dtypes and sizes (rows excepted).

    Arguments are tensors or None. Matrices have rows first, and any number of them; vectors keep their length; of more
    dimensions the last two may vary. ``static`` arguments go first and are constants of the compiled code.
    """

    def __init__(self, function: Callable[..., Any], *static: Any) -> None:
        self._function = function
        self._static = static
        self._families: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor | None) -> Any:
        if not _State.usable or max(tensor.numel() for tensor in tensors if tensor is not None) < SMALL:
            return self._function(*self._static, *tensors)
        family = tuple(_family(tensor) for tensor in tensors)
        try:
            if family in self._families:
                return _run(self._families[family], tensors)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own, at its first use
                self._families[family] = self._compile()
                return _run(self._families[family], tensors)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a compiler may raise; what is wrong with the tensors is raised again below
            result = self._function(*self._static, *tensors)
            _State.usable = False
            warnings.warn(
                f"compiling {self._function.__name__} failed ({type(error).__name__}), so GradLite goes on in eager mode, "
                f"which is slower. On a CPU it needs a C++ compiler (g++); {ENVIRONMENT_SWITCH}=0 silences this.",
                stacklevel=2,
            )
            return result

    def _compile(self) -> Callable[..., Any]:
        function, static = self._function, self._static

        def run(*tensors: Tensor | None) -> Any:
            return function(*static, *tensors)

        # A code object of its own: the compiler counts recompilations by code object and gives up after a few.
        run.__code__ = run.__code__.replace(co_name=function.__name__)
        return torch.compile(run, dynamic=False)


def _run(compiled: Callable[..., Any], tensors: tuple[Tensor | None, ...]) -> Any:
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, _varying(tensor))
    device = next(tensor for tensor in tensors if tensor is not None).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):  # one mode, or the compiler would begin again
        return compiled(*tensors)


def _family(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    varying = _varying(tensor)
    sizes = tuple(1 if size == 1 else None if place in varying else size for place, size in enumerate(tensor.shape))
    return tensor.dtype, tensor.device, sizes, tensor.is_contiguous()


def _varying(tensor: Tensor) -> list[int]:
    """Dimensions whose size the compiled code does not know. A size of one is always known: it may be broadcast."""
    places = [[], [], [0]][tensor.dim()] if tensor.dim() < 3 else [tensor.dim() - 2, tensor.dim() - 1]
    return [place for place in places if tensor.shape[place] != 1]


@cache
def kernel(function: Callable[..., Any], *static: Any) -> Kernel:
    """The one kernel of ``function`` with these constants (hashable)."""
    return Kernel(function, *static)
