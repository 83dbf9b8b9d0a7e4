"""The random generator's state, kept to draw the same numbers again in backward."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state(device: torch.device) -> Tensor:
    """The device's state: 5,056 bytes on a CPU, 16 on CUDA."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def random_state_bytes(device_type: str) -> int:
    """Bytes of :func:`random_state`."""
    return 16 if device_type == "cuda" else 5056


@contextmanager
def restored(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draws from ``state`` on, and from where it was afterwards; does nothing without a state."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def seed_of(*numbers: int) -> int:
    """A generator's seed from numbers of 0 to 2⁶³ − 1: 32 bits, of which each depends on all of them.

    A CPU's generator looks at no more, so that sums and shifts of large numbers would repeat.
    """
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")
