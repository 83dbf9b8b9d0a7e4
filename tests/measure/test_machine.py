"""What is known of the machine."""

import pytest
import torch

from gradlite.measure.machine import machine, multiplies_bfloat16


def test_it_is_described() -> None:
    found = machine()
    assert found["vector_instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["num_threads"] == torch.get_num_threads()
    assert found["memory_bytes"] > 1 << 28
    assert found["gpu"] is None


@pytest.mark.parametrize("supported", [True, False])
def test_a_cpu_multiplies_bfloat16_where_onednn_does(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    assert multiplies_bfloat16() == supported
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert multiplies_bfloat16()


def test_a_build_without_onednn_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not multiplies_bfloat16()
