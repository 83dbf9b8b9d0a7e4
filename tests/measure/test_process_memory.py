"""Anonymous memory of the process: grows with what is held, and the peak remembers it."""

import sys
from pathlib import Path

import pytest
import torch

from gradlite.measure import process_memory
from gradlite.measure.process_memory import anonymous_bytes, anonymous_peak_bytes, forget_peak


def test_a_system_that_does_not_tell_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("VmHWM:\t 4 kB\nVmRSS:\t 4 kB\n")
    for path in (status, tmp_path / "none"):
        monkeypatch.setattr(process_memory, "_STATUS", path)
        assert anonymous_bytes() is None
        assert anonymous_peak_bytes() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_since_it_was_forgotten() -> None:
    num_bytes = 2**27
    before = anonymous_bytes()
    assert before is not None
    torch.ones(num_bytes // 4).sum()
    if not forget_peak():
        pytest.skip("this system does not let a process reset its peak")
    peak = anonymous_peak_bytes()
    assert peak is not None
    assert peak < before + num_bytes / 2  # what was freed before counts no longer
    torch.ones(num_bytes // 4).sum()
    peak = anonymous_peak_bytes()
    after = anonymous_bytes()
    assert peak is not None
    assert after is not None
    assert 0.9 * num_bytes < peak - before < 1.2 * num_bytes
    assert after < before + num_bytes / 2
