"""Numbers as people read them."""

from collections.abc import Sequence


def in_bytes(num_bytes: float) -> str:
    """1.2 GB, 340 MB, 5.0 kB; decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * size:  # which three digits round up
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def in_time(seconds: float) -> str:
    """3:21, or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def in_count(number: float) -> str:
    """134.5 M, 12.3 k, 950."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to ``window − 1`` before it."""
    return [sum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1)]
