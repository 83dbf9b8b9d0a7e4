"""The limits on oneDNN's caches: set where the user has set none. What they are worth stands in docs/log.md."""

import os

import pytest

from gradlite.train.matmul_caches import limit_matmul_caches


def test_the_caches_are_limited_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "none yet")  # so that the test's end takes it back
    del os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    limit_matmul_caches()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
