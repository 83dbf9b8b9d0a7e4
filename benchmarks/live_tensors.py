"""Peaks of live tensors, from the profiler's allocation events: what an allocator without a cache of its own would need."""

import gc
from collections.abc import Callable
from typing import Any

import torch


def peak_and_growth(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of live tensors above the start: at the peak, and when ``work`` (whose result is kept) is over."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak, live
