"""Kernels give the eager result, are compiled once for any number of rows, and do without a compiler."""

import shutil
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from gradlite.hold import compiled
from gradlite.hold.codec import INT8
from gradlite.hold.compiled import SMALL, Kernel, is_compiling_enabled, kernel
from gradlite.hold.holder import Holder
from gradlite.hold.noise import Noise
from gradlite.hold.shelf import Shelf


@pytest.fixture(autouse=True)
def _usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled._State, "usable", True)


def doubled(factor: float, x: Tensor, y: Tensor | None) -> Tensor:
    return x * factor if y is None else x * factor + y


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compiled_codes_for_any_number_of_rows() -> None:
    """Really compiles: the codes are the eager ones, and another length, in another mode, takes the same machine code."""
    from torch._dynamo.utils import counters

    counters.clear()
    kernel.cache_clear()  # what other tests compiled
    compilations = []
    for rows in (600, 400, 1024):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        assert x.numel() >= SMALL
        with torch.set_grad_enabled(rows == 400), torch.autocast("cpu", dtype=torch.bfloat16, enabled=rows == 1024):
            found = Holder(INT8, Noise(5), Shelf()).encode(x)
        wanted = INT8.encode(x, Noise(5).take(rows, 64, x.device))
        # A compiler may divide and multiply in another order, so that one code in thousands is rounded to its neighbour.
        assert (found[0] != wanted[0]).float().mean() < 1e-3
        assert (found[0].int() - wanted[0].int()).abs().max() <= 1
        torch.testing.assert_close(found[1], wanted[1])
        compilations.append(counters["stats"]["unique_graphs"])
    assert compilations == [1, 1, 1]
    assert is_compiling_enabled()


def test_other_sizes_are_other_families_and_small_work_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def fake(function: Any, **_: Any) -> Any:
        nonlocal count
        count += 1
        return function

    monkeypatch.setattr(torch, "compile", fake)
    one = Kernel(doubled, 2.0)
    x = torch.randn(SMALL // 8, 8)
    assert torch.equal(one(x[:5], None), x[:5] * 2)
    assert count == 0
    for _ in range(2):
        assert torch.equal(one(x, None), x * 2)
    one(torch.cat((x, x)), None)
    assert count == 1
    one(x, x)
    one(x.view(-1, 4), None)
    one(x.double(), None)
    assert count == 4
    assert kernel(doubled, 2.0) is kernel(doubled, 2.0)
    assert kernel(doubled, 2.0) is not kernel(doubled, 3.0)


@pytest.mark.parametrize("fails_at", ["once", "the first call"])
def test_without_a_compiler_the_eager_result_and_one_warning(fails_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any, **_: Any) -> Any:
        def run(*_: Any) -> Any:
            raise FileNotFoundError("g++")

        return run() if fails_at == "once" else run

    monkeypatch.setattr(torch, "compile", fail)
    x = torch.randn(SMALL // 8, 8)
    with pytest.warns(UserWarning, match=r"compiling doubled failed \(FileNotFoundError\).*eager.*g\+\+") as caught:
        result = Kernel(doubled, 2.0)(x, None)
    assert len(caught) == 1
    assert torch.equal(result, x * 2)
    assert not is_compiling_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Kernel(doubled, 3.0)(x, None), x * 3)


def test_what_is_wrong_with_the_tensors_is_raised() -> None:
    """And does not switch compilation off."""
    x = torch.randn(SMALL // 8, 8)
    with pytest.raises(RuntimeError, match="must match the size"):
        Kernel(doubled, 2.0)(x, x[:3])
    assert is_compiling_enabled()
