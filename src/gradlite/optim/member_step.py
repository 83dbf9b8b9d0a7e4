"""One weight's way through a step of :class:`gradlite.optim.subspace_adamw.SubspaceAdamW`.

Shape suffixes: M output width, N input width, R rank, S columns of the update, K sampled tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradlite.optim.moments import Moments, MomentsFormat, State, moments_for
from gradlite.optim.rounding import NoiseTable
from gradlite.subspace.collector import Collector
from gradlite.subspace.feedback import ErrorMemory
from gradlite.subspace.transport import transport_moments

PHI_LIMIT = 3.0
"""How far φ may exceed ``1/√mean(v̂)``: never reached while gradients stay within a third of their usual size."""

Feedback = Literal["feedback", "same_step", "off"]


@dataclass(frozen=True)
class SubspaceStep:
    """What all weights' steps have in common."""

    moments: MomentsFormat
    feedback: Feedback
    memory: ErrorMemory

    def moments_of(self, collector: Collector) -> Moments:
        """How the moments of a collector's coordinates are kept."""
        return moments_for(self.moments, collector.rows * collector.basis.rank, collector.coordinates.dtype)

    def remembers(self, collector: Collector) -> bool:
        """Whether there is an error memory: a basis of full rank misses nothing."""
        return self.feedback == "feedback" and collector.basis.rank < collector.basis.width


def tick(state: State) -> int:
    """Counts a step; returns its number, from 1."""
    state["step"] += 1
    return int(state["step"].item())


def carry_moments(
    moments: Moments,
    collector: Collector,
    state: State,
    betas: tuple[float, float],
    basis_NR: Tensor,
    new_NR: Tensor,
    noise: NoiseTable,
) -> None:
    """Moves a weight's moments from one basis to the next."""
    exp_avg_MR, exp_avg_sq_MR = moments.read(state, collector.coordinates.shape)
    rotation_RR = basis_NR.to(exp_avg_MR.dtype).T @ new_NR.to(exp_avg_MR.dtype)
    step, (beta1, beta2) = int(state["step"].item()), betas
    moved = transport_moments(exp_avg_MR, exp_avg_sq_MR, rotation_RR, 1.0 - beta1**step, 1.0 - beta2**step)
    moments.write(state, *moved, noise)


class MemberStep:
    """One weight's way through a step: its direction first, its moments and memory once the basis is decided."""

    def __init__(
        self,
        settings: SubspaceStep,
        state: State,
        collector: Collector,
        group: dict[str, Any],
        clip: Tensor,
        noise: NoiseTable,
    ) -> None:
        self.collector = collector
        self.group = group
        self._settings = settings
        self._state = state
        coordinates = collector.coordinates
        assert coordinates.grad is not None
        self._moments = settings.moments_of(collector)
        if not state:
            self._init_state(coordinates)
        self._number = tick(state)
        self.direction_MR, total = self._moments.advance(
            state, coordinates.grad, self._number, group["betas"], group["eps"], noise
        )
        if collector.sample is not None:
            self._sample_scale = self._scale_of_sample(coordinates.grad, total, clip)
            if settings.remembers(collector):
                settings.memory.add(state, collector.sample, self._sample_scale)

    def _scale_of_sample(self, grad: Tensor, total: Tensor, clip: Tensor) -> Tensor:
        """What makes the residual's sample an update: ``φκ``, and the factor by which the gradients were clipped."""
        grad_MR = grad.to(self.direction_MR.dtype)
        tiny = torch.finfo(grad_MR.dtype).tiny
        phi = torch.linalg.vector_norm(self.direction_MR) / torch.linalg.vector_norm(grad_MR).clamp_min(tiny)
        # A gradient that hardly enters the basis would make φ boundless; Adam's own mean unit 1/√v̂ bounds it.
        total = (total / (1.0 - self.group["betas"][1] ** self._number)).clamp_min(tiny)
        phi = torch.minimum(phi, PHI_LIMIT * (grad_MR.numel() / total).sqrt())
        return phi * clip.to(grad_MR.dtype) * self.collector.signal_share().to(grad_MR.dtype)

    def _init_state(self, coordinates: Tensor) -> None:
        collector, settings = self.collector, self._settings
        self._state["step"] = torch.zeros(())
        self._state.update(self._moments.init(coordinates.shape, coordinates))
        if settings.remembers(collector):
            rank, width = collector.basis.rank, collector.basis.width
            self._state.update(settings.memory.init(collector.rows, width, rank, coordinates.new_empty(0)))

    def finish(self, basis_NR: Tensor, new_NR: Tensor | None, noise: NoiseTable) -> tuple[Tensor, Tensor]:
        """The weight's update as two factors, M×S and N×S; the moments move with the basis."""
        compute = self.direction_MR.dtype
        basis_NR = basis_NR.to(compute)
        left, right = [self.direction_MR], [basis_NR]
        sample, settings = self.collector.sample, self._settings
        if settings.feedback == "same_step" and sample is not None:
            left.append(sample.left_KM.to(compute).T * self._sample_scale)
            right.append(sample.right_KN.to(compute).T)
        if new_NR is not None:
            carry_moments(self._moments, self.collector, self._state, self.group["betas"], basis_NR, new_NR, noise)
            if settings.remembers(self.collector):
                new_NR = new_NR.to(compute)
                left.append(settings.memory.release(self._state, new_NR).to(compute))
                right.append(new_NR)
        return (left[0], right[0]) if len(left) == 1 else (torch.cat(left, 1), torch.cat(right, 1))
