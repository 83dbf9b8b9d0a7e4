"""Which tensors live at the peak of a training step, by what they are for: every allocation that torch makes is watched.

How: torch's profiler reports each block that an allocator hands out or takes back, on CPUs and on CUDA, with its address. Marks
(:func:`torch.profiler.record_function`, on the same clock) say when the forward pass ended and where gradients were seen;
:mod:`gradlite.measure.allocations` does the rest.

Why not a ``TorchDispatchMode`` with weak references to storages: it sees the results of operators only, neither the workspace
inside one nor what compiled kernels take, and the peak is often just there. ``saved_tensors_hooks`` miss what an autograd
function keeps as attributes, such as int8 codes, and change how checkpointing works. torch's own ``_memory_profiler``
classifies by ``nn.Module`` and ``Optimizer`` hooks and needs every stack; fused backward passes escape it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import record_function

from gradlite.measure.allocations import ByCategory, Change, Sighting, StepTimes, split_peak

_MARK = "gradlite.measure:"


class AllocationWatch:
    """Watches from its ``with`` to its end; begin it before the method is built, so that its state is seen to be made.

    Inside, :meth:`step` wraps the steps to be judged; afterwards :attr:`peaks` holds what lived at the peak of each.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # CUDA's allocator reports to the CPU's profiler as well; tracing kernels would cost time for nothing.
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False)
        self._addresses: list[list[int]] = []  # by number of the mark at which gradients were looked for
        self._weights: list[dict[int, int]] = []  # of each step, when it began
        self.peaks: list[ByCategory] = []

    def __enter__(self) -> Self:
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._profile.__exit__(kind, error, trace)
        if kind is None:
            self.peaks = self._judge()
        del self._profile

    @contextmanager
    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator["StepMarks"]:
        """One step, from before its forward pass until its gradients are cleared and its loss is dropped."""
        leaves = _leaves(model, optimizer)
        number = len(self._weights)
        self._weights.append(weight_bytes(model))
        handles = [_first_hook(leaf, self._see) for leaf in leaves]
        try:
            self._mark(f"begin:{number}")
            yield StepMarks(lambda: self._mark(f"forward:{number}"), lambda: self._see(*leaves))
            self._mark(f"end:{number}")
        finally:
            for remove in handles:
                remove()

    def _see(self, *leaves: Tensor) -> None:
        """Note where the gradients of these leaves are."""
        found = [leaf.grad.untyped_storage().data_ptr() for leaf in leaves if leaf.grad is not None]
        self._addresses.append(found)
        self._mark(f"gradients:{len(self._addresses) - 1}")

    def _mark(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        with record_function(_MARK + name):
            pass

    def _judge(self) -> list[ByCategory]:
        changes, marks = [], {}
        for event in _events(self._profile):
            if event.tag == _EventType.Allocation:
                block = event.extra_fields
                if block.device.type == self._device.type:
                    changes.append(Change(event.start_time_ns, block.ptr, block.alloc_size))
            elif event.name.startswith(_MARK):
                marks[event.name.removeprefix(_MARK)] = event.start_time_ns
        sightings = [
            Sighting(marks[f"gradients:{number}"], address) for number, found in enumerate(self._addresses) for address in found
        ]
        return [
            split_peak(
                changes,
                sightings,
                weights,
                StepTimes(marks[f"begin:{number}"], marks[f"forward:{number}"], marks[f"end:{number}"]),
            )
            for number, weights in enumerate(self._weights)
        ]


class StepMarks:
    """What a training loop says while it makes a watched step."""

    def __init__(self, forward_ended: Callable[[], None], backward_ended: Callable[[], None]) -> None:
        self.forward_ended = forward_ended
        self.backward_ended = backward_ended


def weight_bytes(model: nn.Module) -> dict[int, int]:
    """Bytes by address of the storages of all parameters and buffers; a storage that several share counts once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _leaves(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    grouped = (tensor for group in optimizer.param_groups for tensor in group["params"])
    leaves = {id(tensor): tensor for tensor in (*model.parameters(), *grouped) if tensor.requires_grad}
    return list(leaves.values())


def _first_hook(leaf: Tensor, hook: Callable[[Tensor], None]) -> Callable[[], None]:
    """Registers a hook before those that are there already: a fused backward pass has dropped the gradient in its own."""
    handle = leaf.register_post_accumulate_grad_hook(hook)
    hooks: dict[int, Any] = leaf._post_accumulate_grad_hooks
    for number in [number for number in hooks if number != handle.id]:
        hooks[number] = hooks.pop(number)
    return handle.remove


def _events(profile: torch.profiler.profile) -> Iterable[Any]:
    """Every event of the profile, allocations and marks among them."""
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(event.children)
