"""What the model card tells the hub."""

from pathlib import Path

import pytest

from gradlite.train.card import _base_model, _datasets


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}),
        ("Qwen/Qwen2.5-0.5B", {"base_model": "Qwen/Qwen2.5-0.5B"}),
        (".", {}),
        ("~/tiny", {}),
    ],
)
def test_the_base_model_is_a_hub_id_or_nothing(
    name: str, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny").mkdir()
    assert _base_model(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("python-help", {}), ("openai/gsm8k", {"datasets": ["openai/gsm8k"]}), (".", {}), ("~/tiny", {})]
)
def test_the_data_set_is_a_hub_id_or_nothing(
    name: str, expected: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny").mkdir()
    assert _datasets(name) == expected
