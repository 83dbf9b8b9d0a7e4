"""Finds out that a tensor is held already, so that no tensor is held twice."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gradlite.hold.ticket import Held

_LIMIT = 16  # tensors that are looked for again are read within the same block


class _Entry:
    def __init__(self, x: Tensor, held: Held, dtype: torch.dtype | None) -> None:
        self.storage = StorageWeakRef(x.untyped_storage())
        self.key = _key(x)
        self.held = held
        self.dtype = dtype
        self.hooks = _hooks()


def _key(x: Tensor) -> tuple[object, ...]:
    return x.storage_offset(), x.numel(), x.dtype, x._version


def _hooks() -> object:
    """What looks at the tensors that are being saved now: checkpointing, or offloading by the user."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class Shelf:
    """Remembers what is held for tensors that are still alive, by their storage: a reshaped view is the same tensor.

    Only for those who save under the same hooks: what was held outside of a checkpointed part would not be found when that
    part runs again, and it would save other tensors than the first time.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_entries": []}

    def offer(self, x: Tensor, held: Held, dtype: torch.dtype | None = None) -> None:
        """Whoever asks for ``x`` (unchanged since), in ``dtype`` if it is given, from now on gets ``held``.

        A tensor that is not contiguous is not remembered: its transpose has the same storage, and would be taken for it.
        """
        if not x.is_contiguous():
            return
        self._entries = [entry for entry in self._entries[-_LIMIT:] if not entry.storage.expired()]
        self._entries.append(_Entry(x, held, dtype))

    def find(self, x: Tensor, dtype: torch.dtype | None = None) -> Held | None:
        """What is held for ``x``, or None. ``dtype``: that the asker wants, if not any."""
        if not x.is_contiguous():
            return None
        storage, key, hooks = None, _key(x), _hooks()
        for entry in reversed(self._entries):
            if (
                entry.key == key
                and entry.hooks == hooks
                and (dtype is None or entry.dtype in (None, dtype))
                and not entry.storage.expired()
            ):
                storage = storage or StorageWeakRef(x.untyped_storage())
                if entry.storage == storage:
                    return entry.held
        return None

    def clear(self) -> None:
        """Lets go of all leaves; called when a forward pass is over, after which autograd alone decides how long they live."""
        self._entries.clear()
