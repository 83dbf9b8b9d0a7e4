"""Out of memory: said in one sentence with what helps, instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradlite.errors import GradLiteError

# How torch's allocators and CUDA's libraries say so where they raise a plain RuntimeError.
_SIGNS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Turn a failed allocation, on the CPU or on CUDA, into a `GradLiteError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise GradLiteError(
            "the run needs more memory than there is; give a smaller --batch-size (with more --accumulation for the same "
            "step), a shorter --seq-len, or with GradLite a lower --rank."
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory could not be allocated."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in _SIGNS)
