"""From a list of allocations to what lived at the peak of a training step, by what it was for. Pure: no torch.

Categories, in the order in which they are decided:

- weights: storages of the model's parameters and buffers.
- gradients: what was seen as some parameter's ``.grad``, from its allocation on.
- optimizer_state: what else lived before the step began or lives on after it: moments, projections, error memories, masters.
- held_activations: what else the forward pass made and autograd (or anything else) still held when it was over.
- temporaries: the rest, such as an operator's workspace, activation gradients, and what a checkpoint computes again.

The rules look only at when memory was taken and given back. So they see what Python does not: tensors that an autograd
function keeps as attributes, workspace inside C++ operators and backward passes, and buffers of compiled kernels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple


class Change(NamedTuple):
    """Memory taken (``num_bytes`` above 0) or given back (below 0) at an address. Time in nanoseconds on any one clock."""

    time: int
    address: int
    num_bytes: int


class Sighting(NamedTuple):
    """A gradient was seen at this address at this time."""

    time: int
    address: int


@dataclass(frozen=True)
class StepTimes:
    """When a step began, when its forward pass was over, and when it ended (its gradients cleared)."""

    begin: int
    forward_end: int
    end: int


@dataclass(frozen=True)
class ByCategory:
    """Bytes by what they are for."""

    weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    held_activations: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


CATEGORIES = tuple(field.name for field in fields(ByCategory))


@dataclass
class _Block:
    address: int
    num_bytes: int
    start: int
    end: int | None = None

    def lives_at(self, time: int) -> bool:
        return self.start <= time and (self.end is None or time < self.end)


def split_peak(
    changes: Iterable[Change], gradients: Sequence[Sighting], weights: Mapping[int, int], step: StepTimes
) -> ByCategory:
    """What lived at the peak of the step.

    ``changes`` may begin long before the step; memory given back that was taken earlier still is passed over. ``weights``:
    bytes by address of the model's storages when the step began; those that ``changes`` do not show were there before.
    """
    blocks = _blocks(changes)
    shown = {block.address for block in blocks if block.address in weights and block.lives_at(step.begin)}
    before = sum(num_bytes for address, num_bytes in weights.items() if address not in shown)
    kinds = _kinds(blocks, gradients, weights, step)
    moves: list[tuple[int, int, str]] = []
    for block, kind in zip(blocks, kinds, strict=True):
        moves.append((block.start, block.num_bytes, kind))
        if block.end is not None:
            moves.append((block.end, -block.num_bytes, kind))
    live = dict.fromkeys(CATEGORIES, 0)
    live["weights"] = before
    total = before
    peak: tuple[int, ByCategory] | None = None
    for time, num_bytes, kind in sorted(moves, key=lambda move: move[0]):
        if time > step.end:
            break
        if time > step.begin and peak is None:
            peak = (total, ByCategory(**live))
        live[kind] += num_bytes
        total += num_bytes
        if time > step.begin and (peak is None or total > peak[0]):
            peak = (total, ByCategory(**live))
    return peak[1] if peak else ByCategory(**live)


def _blocks(changes: Iterable[Change]) -> list[_Block]:
    open_blocks: dict[int, _Block] = {}
    blocks = []
    for time, address, num_bytes in sorted(changes, key=lambda change: change.time):
        if num_bytes > 0:
            block = open_blocks[address] = _Block(address, num_bytes, time)
            blocks.append(block)
        elif address in open_blocks:
            open_blocks.pop(address).end = time
    return blocks


def _kinds(blocks: Sequence[_Block], gradients: Sequence[Sighting], weights: Mapping[int, int], step: StepTimes) -> list[str]:
    times_by_address: dict[int, list[int]] = {}
    for time, address in gradients:
        times_by_address.setdefault(address, []).append(time)

    def kind(block: _Block) -> str:
        if block.address in weights and block.lives_at(step.begin):
            return "weights"
        if any(block.lives_at(time) for time in times_by_address.get(block.address, ())):
            return "gradients"
        if block.lives_at(step.begin) or block.lives_at(step.end):
            return "optimizer_state"
        if step.begin < block.start <= step.forward_end and block.lives_at(step.forward_end):
            return "held_activations"
        return "temporaries"

    return [kind(block) for block in blocks]
