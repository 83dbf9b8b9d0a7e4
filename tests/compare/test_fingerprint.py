"""What tells two files of the same name apart."""

from pathlib import Path

import pytest

from gradlite.compare import fingerprint as module
from gradlite.compare.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 4)
    monkeypatch.setattr(module, "_NUM_PIECES", 3)


def made(folder: Path, **contents: bytes) -> str:
    (folder / "data").mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return str(folder)


def test_content_counts_and_the_place_does_not(tmp_path: Path) -> None:
    ours = fingerprint(made(tmp_path / "a", config=b"{}", weights=b"0123456789"))
    assert ours == fingerprint(made(tmp_path / "b", config=b"{}", weights=b"0123456789"))
    assert ours is not None
    assert len(ours) == 12
    for number, other in enumerate(
        [
            {"config": b"{}", "weights": b"0123456780"},  # the last piece
            {"config": b"{}", "weights": b"01234567890"},
            {"config": b"{}"},
            {"config": b"{}0", "weights": b"123456789"},
            {"conf": b"{}", "weights": b"0123456789"},
            {"config": b"{}", "weights": b"0123456789", "data/part": b"0"},
        ]
    ):
        assert fingerprint(made(tmp_path / f"other-{number}", **other)) != ours


def test_of_a_long_file_pieces_from_begin_to_end_are_read(tmp_path: Path) -> None:
    """Thirty bytes, of which 0 to 3, 10 to 13 and 20 to 23 are read."""
    original = bytes(30)
    ours = fingerprint(made(tmp_path / "a", weights=original))
    for place, noticed in ((0, True), (3, True), (4, False), (10, True), (23, True), (29, False)):
        changed = bytearray(original)
        changed[place] = 1
        assert (fingerprint(made(tmp_path / f"at-{place}", weights=bytes(changed))) != ours) is noticed


@pytest.mark.parametrize("name", ["owner/model", "smollm2"])
def test_what_is_no_path_has_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fingerprint(name) is None
