"""While a run is on the screen, only our own lines are: the libraries' bars, logs and warnings are held back."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

_LIBRARIES = r"(torch|transformers|trl|datasets|accelerate|huggingface_hub|gguf|multiprocess|pyarrow)(\..*)?"


@contextmanager
def quiet_libraries(console: Console) -> Iterator[None]:
    """Silence transformers, datasets and the hub's client below errors, and their and torch's warnings; show other warnings as
    a line on `console`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = (transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled())
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it tells of every retry, twice
    datasets_verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_LIBRARIES)
            warnings.showwarning = lambda message, *_args, **_keywords: console.print(
                Text(f"warning: {message}", style="yellow")
            )
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        datasets.logging.set_verbosity(datasets_verbosity)
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
