"""Which number format a run gets, by what was asked for and what the machine is fast with."""

import pytest

from gradlite.train import number_format as module
from gradlite.train.number_format import number_format


@pytest.mark.parametrize(
    ("asked", "is_fast", "given", "told"),
    [
        ("auto", True, "bfloat16", None),
        ("bfloat16", True, "bfloat16", None),
        ("float32", True, "float32", None),
        ("auto", False, "float32", "float32 instead"),
        ("bfloat16", False, "bfloat16", "--dtype float32"),
        ("float32", False, "float32", None),
    ],
)
def test_what_is_asked_for_and_what_is_fast(
    asked: str, is_fast: bool, given: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: is_fast)
    dtype, notice = number_format(asked)
    assert dtype == given
    assert notice is None if told is None else told in str(notice)
