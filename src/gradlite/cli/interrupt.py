"""A process that is asked to end ends as with Ctrl-C: its caller can say how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt too; those that are ignored, as under nohup, stay ignored."""
    before = {ending: signal.getsignal(ending) for ending in (signal.SIGTERM, signal.SIGHUP)}
    heeded = [ending for ending, handler in before.items() if handler is not signal.SIG_IGN]
    for ending in heeded:
        signal.signal(ending, _interrupt)
    try:
        yield
    finally:
        for ending in heeded:
            signal.signal(ending, before[ending])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
