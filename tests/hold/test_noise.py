"""Noise is a function of the seed and of how often it was read, and close to uniform wherever it is read."""

import pickle

import pytest
import torch
from torch import Tensor

from gradlite.hold import noise as module
from gradlite.hold.noise import Noise

CPU = torch.device("cpu")


def reads(noise: Noise, count: int) -> list[Tensor]:
    return [noise.take(13, 48, CPU).clone() for _ in range(count)]


def test_the_same_seed_and_reads_give_the_same_bytes() -> None:
    first = reads(Noise(3), 5)
    assert all(torch.equal(a, b) for a, b in zip(first, reads(Noise(3), 5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, reads(Noise(4), 5), strict=True))
    assert not any(torch.equal(first[a], first[b]) for a in range(5) for b in range(a))


def test_restored_reads_go_on_with_the_same_bytes() -> None:
    noise = Noise(3)
    reads(noise, 4)
    resumed = Noise(3)
    resumed.reads = noise.reads
    copied = pickle.loads(pickle.dumps(noise))
    wanted = reads(noise, 3)
    for other in (resumed, copied):
        assert all(torch.equal(a, b) for a, b in zip(wanted, reads(other, 3), strict=True))


def test_it_is_uniform_and_rows_differ() -> None:
    noise = Noise(0)
    bytes_ = torch.stack([noise.take(64, 200, CPU) for _ in range(400)])
    counts = torch.bincount(bytes_.flatten(), minlength=256).double()
    assert ((counts / counts.sum() * 256 - 1).abs() < 0.05).all()
    assert ((bytes_.double().mean(0) - 127.5).abs() < 5 * 73.9 / 20).all()  # of every element, over the reads
    columns = bytes_[0].double()  # a column's noise in one tensor: as if drawn anew for every row
    assert ((columns.mean(0) - 127.5).abs() < 5 * 73.9 / 8).all()
    assert len({tuple(row.tolist()) for row in bytes_[0]}) == 64


def test_any_number_of_rows_and_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    small = 1 << 12
    monkeypatch.setattr(module, "TABLE_BYTES", small)
    noise = Noise(0)
    for rows, width in ((0, 8), (1, 8), (small, 8), (3, 2 * small), (100, 100), (2 * small, 96)):
        for _ in range(70):  # as many places as the smallest table has
            taken = noise.take(rows, width, CPU)
            assert taken.shape == (rows, width)
            assert rows < 2 or 1 <= taken.stride(0) <= 61
            if taken.numel() > 1000:  # in more than one place, for PyTorch itself checks that a view stays inside
                assert abs(taken.double().mean() - 127.5) < 20


def test_where_there_is_room_rows_lie_far_apart() -> None:
    assert Noise(0).take(2048, 1536, CPU).stride(0) == 61
