"""How much anonymous memory (heap, not files) this process has in use, and had at most. Linux only; elsewhere None.

It holds what torch's allocator does not see: scratch space of matrix libraries, and memory that the heap did not give back.
"""

import contextlib
import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
_KEYS = ("RssAnon", "RssFile", "RssShmem", "VmHWM")


def give_back_free_memory() -> None:
    """Return to the system what the heap holds and nobody uses, where the C library can do that (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def anonymous_bytes() -> int | None:
    """Anonymous memory in use now, after :func:`give_back_free_memory`."""
    give_back_free_memory()
    status = _read_status()
    return None if status is None else status["RssAnon"]


def forget_peak() -> bool:
    """Start a new measurement of :func:`anonymous_peak_bytes`; False where the system has none or does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def anonymous_peak_bytes() -> int | None:
    """The peak since :func:`forget_peak`: the resident set's, less the file pages, which hardly change within a step."""
    status = _read_status()
    return None if status is None else status["VmHWM"] - status["RssFile"] - status["RssShmem"]


def _read_status() -> dict[str, int] | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    pairs = (line.split(":", 1) for line in lines if line.startswith(_KEYS))
    found = {key: int(value.split()[0]) * 1024 for key, value in pairs}
    return found if len(found) == len(_KEYS) else None  # not every kernel tells all
