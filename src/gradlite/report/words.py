"""Numbers as a page says them."""

from gradlite.train.words import in_bytes

NOTHING = "–"


def in_loss(loss: float | None) -> str:
    """Nats per token, four digits."""
    return NOTHING if loss is None else f"{loss:.4f}"


def in_memory(num_bytes: float | None) -> str:
    """1.21 GB."""
    return NOTHING if num_bytes is None else in_bytes(num_bytes)


def in_percent(fraction: float) -> str:
    """+1.3 %, −0.4 %."""
    return f"{100 * fraction:+z.1f} %".replace("-", "−")


def counted(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
