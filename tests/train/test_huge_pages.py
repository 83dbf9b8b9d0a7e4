"""Huge pages: asked for where the user has not chosen, before torch is there."""

import subprocess
import sys
from pathlib import Path

import pytest

from gradlite.measure import machine
from gradlite.measure.machine import has_huge_pages
from gradlite.train.huge_pages import ask_for_huge_pages


@pytest.mark.parametrize(("system", "expected"), [("always [madvise] never", True), ("always madvise [never]", False)])
def test_they_are_asked_for_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, expected: bool
) -> None:
    (tmp_path / "enabled").write_text(system)
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    ask_for_huge_pages()
    assert not has_huge_pages()
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    ask_for_huge_pages()
    assert has_huge_pages() == expected
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "no such file")
    assert not has_huge_pages()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the page table of a Linux process")
def test_the_command_line_gets_them_where_the_system_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reads the variable when it makes its first tensor, so it must be set by then."""
    program = """
import sys
from gradlite.cli import app
sys.argv = ["gradlite", "--version"]
try:
    app.main()
except SystemExit:
    pass
assert "torch" not in sys.modules
import torch
from pathlib import Path
def huge():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])
before = huge()
kept = torch.ones(64 << 20, dtype=torch.uint8)
print((huge() - before) // 1024)
"""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    got = int(done.stdout.splitlines()[-1])  # MB
    assert got >= 32 if has_huge_pages() else got >= 0
