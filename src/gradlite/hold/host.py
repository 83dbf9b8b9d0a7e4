"""Leaves that wait in the host's memory, and come back to the device shortly before backward needs them.

Each leaf is copied once, whoever asks for it. Backward asks in the reverse order of the forward pass, so while one leaf is
used the ones before it are on their way (as in torchtune's and TRL's activation offloading, which would copy a tensor once for
every operator that saves it).
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST_BYTES = 1 << 16
"""Smaller leaves (scales, numbers a token) stay: a copy would cost more time than their place is worth."""

AHEAD = 3
"""Leaves on their way back at a time: about those of one operator."""

RECENT = 4
"""Leaves that stay on the device after use: the layer that reads a result and the operator that made it ask in turn."""


class Link(Protocol):
    """The way between device and host."""

    def away(self, x: Tensor) -> Tensor:
        """A copy in the host's memory; may still be under way when this returns."""

    def begin_back(self, x: Tensor) -> Tensor:
        """A copy on the device of what :meth:`away` returned; not to be used before :meth:`end_back`."""

    def end_back(self, x: Tensor) -> None:
        """The copy can be used by whatever is computed next."""


class CudaLink:
    """Pinned memory and a stream of its own, so that copies run beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._arrivals: dict[int, torch.cuda.Event] = {}

    def away(self, x: Tensor) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host = torch.empty_like(x, device="cpu", pin_memory=True)
            host.copy_(x, non_blocking=True)
        x.record_stream(self._stream)  # or its memory could be given away while it is read
        return host

    def begin_back(self, x: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            copy = x.to(self._device, non_blocking=True)
            self._arrivals[copy.data_ptr()] = self._stream.record_event()
        return copy

    def end_back(self, x: Tensor) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._arrivals.pop(x.data_ptr()))
        x.record_stream(current)


class _Waiting:
    """One leaf that is away; autograd owns it. ``copy``: on its way back, or back."""

    def __init__(self, host: Tensor) -> None:
        self.key = host.data_ptr()
        self.storage = StorageWeakRef(host.untyped_storage())
        self._form = host.shape, host.stride(), host.dtype
        self.copy: Tensor | None = None
        self.has_arrived = False

    def host(self) -> Tensor | None:
        """The leaf, or None if nothing needs it any more."""
        storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            return None
        shape, stride, dtype = self._form
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape, stride)

    def let_go(self) -> None:
        """Of the copy on the device."""
        self.copy, self.has_arrived = None, False


class Host:
    """The place of one model's leaves. On a CPU, where the host's memory is the model's own, nothing is copied.

    ``link``: None makes a :class:`CudaLink` with the first leaf on CUDA.
    """

    def __init__(self, link: Link | None = None) -> None:
        self._link = link
        self._order: list[_Waiting] = []
        self._by_key: dict[int, _Waiting] = {}
        self._recent: deque[_Waiting] = deque()
        self._backward = -1

    def __getstate__(self) -> dict[str, object]:
        return {"_link": None, "_order": [], "_by_key": {}, "_recent": deque(), "_backward": -1}

    def put(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._put(leaf) for leaf in leaves)

    def _put(self, leaf: Tensor) -> Tensor:
        if self._link is None and leaf.is_cuda:
            self._link = CudaLink(leaf.device)
        if self._link is None or leaf.nbytes < SMALLEST_BYTES:
            return leaf
        self._forget_the_dead()
        host = self._link.away(leaf.contiguous())
        waiting = _Waiting(host)
        self._by_key[waiting.key] = waiting
        self._order.append(waiting)
        return host

    def _forget_the_dead(self) -> None:
        """Their addresses may be used again."""
        while self._recent:
            self._recent.popleft().let_go()
        ends = self._order[-1:] + self._order[:1]
        if len(self._by_key) != len(self._order) or any(waiting.storage.expired() for waiting in ends):
            self._order = [waiting for waiting in self._order if not waiting.storage.expired()]
            self._by_key = {waiting.key: waiting for waiting in self._order}

    def fetch(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._fetch(leaf) for leaf in leaves)

    def _fetch(self, leaf: Tensor) -> Tensor:
        waiting = self._by_key.get(leaf.data_ptr())
        if self._link is None or waiting is None or waiting.storage != StorageWeakRef(leaf.untyped_storage()):
            return leaf
        self._let_go_after_backward()
        if waiting.copy is None:
            waiting.copy = self._link.begin_back(leaf)
        self._send_for_those_before(waiting)
        if not waiting.has_arrived:
            self._link.end_back(waiting.copy)
            waiting.has_arrived = True
            self._recent.append(waiting)
        copy = waiting.copy
        while len(self._recent) > RECENT:
            self._recent.popleft().let_go()
        return copy

    def _let_go_after_backward(self) -> None:
        running = torch._C._current_graph_task_id()
        if running not in (-1, self._backward):
            self._backward = running
            torch.autograd.Variable._execution_engine.queue_callback(self._let_go)

    def _let_go(self) -> None:
        self._recent.clear()
        for waiting in self._order:
            waiting.let_go()

    def _send_for_those_before(self, waiting: _Waiting) -> None:
        assert self._link is not None
        while self._order[-1] is not waiting and self._order[-1].storage.expired():
            self._order.pop()
        place = len(self._order) - 1 - self._order[::-1].index(waiting)
        for earlier in reversed(self._order[max(0, place - AHEAD) : place]):
            host = earlier.host() if earlier.copy is None else None
            if host is not None:
                earlier.copy = self._link.begin_back(host)
