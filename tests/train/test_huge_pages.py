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


def test_the_command_line_asks_before_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reads the variable when it makes its first tensor."""
    program = """
import os, sys
from gradlite.cli import app
sys.argv = ["gradlite", "--version"]
try:
    app.main()
except SystemExit:
    pass
print(os.environ["THP_MEM_ALLOC_ENABLE"], "torch" in sys.modules)
import torch
kept = torch.ones(64 << 20, dtype=torch.uint8)
with open("/proc/self/smaps_rollup") as file:
    print(next(line for line in file if line.startswith("AnonHugePages")).split()[1])
"""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[1] == "1 False", done.stderr
    system = Path("/sys/kernel/mm/transparent_hugepage")
    are_for_who_asks = system.exists() and "[madvise]" in (system / "enabled").read_text()
    if len(lines) == 3 and are_for_who_asks and (system / "hpage_pmd_size").read_text().strip() == str(2 << 20):
        assert int(lines[2]) >= 2 << 10, "none of 64 MB is in huge pages"  # kB; of fragmented memory only a part
