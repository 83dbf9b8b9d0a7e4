"""What is read as the process's peak memory."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from gradlite.measure.memory import peak_memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_covers_what_is_resident_and_stays_when_it_is_freed() -> None:
    held = torch.ones(2**24)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    peak = peak_memory_bytes(torch.device("cpu"))
    assert resident > held.nbytes
    assert peak >= 0.99 * resident  # the kernel counts pages in batches
    del held
    assert peak_memory_bytes(torch.device("cpu")) >= peak
