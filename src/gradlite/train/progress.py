"""The line that tells how the run is going: alive on a terminal, a line every so often elsewhere."""

import math
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gradlite.train.callback import StepReport
from gradlite.train.words import in_bytes, in_time

_NUM_PLAIN_LINES = 20


class Progress:
    """Shows step reports on a console; a context manager, since a live line has to be closed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, report: StepReport) -> None:
        """Show one step. Off a terminal: the first, the last, every twentieth of the run, and every skipped step."""
        line = progress_line(report)
        if self._live:
            self._live.update(line, refresh=True)
            return
        every = max(1, math.ceil(report.num_steps / _NUM_PLAIN_LINES))
        if report.step in (1, report.num_steps) or report.step % every == 0 or not math.isfinite(report.loss):
            self.console.print(line)

    def show_evaluation(self, step: int, loss: float) -> None:
        """Show a held-out loss, above the live line."""
        self.console.print(Text(f"step {step}  held-out loss {loss:.4f}"))


def progress_line(report: StepReport) -> Text:
    """`step 12/60  loss 1.2345  gradient 0.56  812 tokens/s  peak 1.2 GB  left 3:21`, and skipped steps if any."""
    without_gradient = math.isnan(report.grad_norm) and math.isfinite(report.loss)  # a fused backward pass keeps none
    parts = [
        f"step {report.step}/{report.num_steps}",
        f"loss {report.loss:.4f}",
        *([] if without_gradient else [f"gradient {report.grad_norm:.3g}"]),
        f"{report.tokens_per_second:,.0f} tokens/s",
        f"peak {in_bytes(report.peak_memory_bytes)}",
        f"left {in_time(report.seconds_left)}",
    ]
    line = Text("  ".join(parts))
    if report.skipped_steps:
        line.append(f"  skipped {report.skipped_steps}", style="bold red")
    return line
