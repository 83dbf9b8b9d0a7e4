"""AdamW in coordinates, with error feedback and moving bases: the loop over pure per-tensor steps.

Shape suffixes: M output width, N input width, R rank, K sampled tokens.

For every projected weight, in one step (docs/method.md, sections 3 to 5):

1. ``Ũ`` (M×R): AdamW's direction from ``C.grad`` and the coordinates' moments.
2. the residual sample goes, in update units ``φ = ‖Ũ‖/‖C.grad‖`` and shrunk to its signal ``κ``, to the error memory
   (``feedback``) or at once to the weight (``same_step``).
3. where the basis is due: it is refreshed from the window's sketch ``GᵀΨ``, the moments move along, and what the memory
   holds inside the new basis is released to the weight.
4. one fused write: ``W ← (1 − ηλ)W − η s [Ũ Pᵀ + (eP')P'ᵀ]``, ``s = √(n/r)``, rounded stochastically in bfloat16.

This module knows tensors and collectors; models belong to :mod:`gradlite.attaching` and :mod:`gradlite.methods`.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradlite.errors import GradLiteError
from gradlite.optim.moments import MomentsFormat, moments_for
from gradlite.optim.rounding import NoiseTable, dense_update_, low_rank_update_
from gradlite.subspace.basis import refreshed_basis
from gradlite.subspace.collector import Basis, Collector, Coordinates, Window
from gradlite.subspace.energy import outside_probes, share_inside
from gradlite.subspace.feedback import ErrorMemory, FactoredMemory, FullMemory, Int4Memory
from gradlite.subspace.transport import transport_moments

PHI_LIMIT = 3.0
"""How far φ may exceed ``1/√mean(v̂)``: never reached while gradients stay within a third of their usual size."""

REFRESHES_A_MEASUREMENT = 2
"""At every second refresh of a basis the gradient's energy inside it is measured: at each it took 0.6 % of a step's time."""

Feedback = Literal["feedback", "same_step", "off"]
MemoryFormat = Literal["factored", "int4", "fp32"]


def error_memory(fmt: MemoryFormat, generator: Callable[[], torch.Generator]) -> ErrorMemory:
    """The memory of the given format."""
    memories: dict[str, ErrorMemory] = {"factored": FactoredMemory(), "fp32": FullMemory()}
    return memories.get(fmt) or Int4Memory(generator)


class SubspaceAdamW(Optimizer):
    """AdamW on coordinates and on plain parameters.

    Args:
        groups: param groups with ``params``, ``lr``, ``betas``, ``eps``, ``weight_decay``. Coordinates among the params are
            recognised by ``weights``; everything else is trained by plain AdamW.
        window: the model's window, whose collectors absorb gradients.
        weights: the projected weight (M×N) of every collector, in the window's order.

    Raises nothing for NaN or infinity: such a step leaves everything as it was and is counted in ``skipped_steps``.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        window: Window,
        weights: list[Tensor],
        *,
        feedback: Feedback,
        feedback_memory: MemoryFormat,
        refresh_interval: int,
        moments: MomentsFormat,
        stochastic_rounding: bool,
    ) -> None:
        super().__init__(groups, {})
        self._feedback = feedback
        self._feedback_memory = feedback_memory
        self._follow(window, weights)
        self._refresh_interval = refresh_interval
        self._moments: MomentsFormat = moments
        self._stochastic_rounding = stochastic_rounding
        self._global_step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0

    def _follow(self, window: Window, weights: list[Tensor]) -> None:
        self._window = window
        self._collector_of = {id(c.coordinates): c for c in window.collectors}
        self._weight_of = dict(zip((id(c) for c in window.collectors), weights, strict=True))
        self._memory = error_memory(self._feedback_memory, lambda: window.generator)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch's own keeps only what all optimizers have, and what is looked up by identity is made anew."""
        kept = {name: getattr(self, name) for name in _COPIED}
        return {**super().__getstate__(), **kept, "_weights": list(self._weight_of.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("_weights", None)
        super().__setstate__(state)
        if weights is not None:  # torch's load_state_dict comes by here too, with nothing but its own
            self._follow(self._window, weights)

    # ---- the step -------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients at hand; skipped and counted if any of them is NaN or infinite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._all_finite():
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            self._window.clear()
            return loss
        self.skipped_in_a_row = 0
        noise = NoiseTable(self._window.generator, self._window.residual_norm.device)
        clip = self._window.clip_factor()
        members: dict[int, list[tuple[Collector, dict[str, Any]]]] = defaultdict(list)
        idle: dict[int, list[tuple[Collector, dict[str, Any]]]] = defaultdict(list)
        bases: dict[int, Basis] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param is self._window.residual_norm:
                    continue
                if param.grad is None:
                    if isinstance(param, Coordinates):
                        collector = self._collector_of[id(param)]
                        idle[id(collector.basis)].append((collector, group))
                    continue
                if isinstance(param, Coordinates):
                    collector = self._collector_of[id(param)]
                    members[id(collector.basis)].append((collector, group))
                    bases[id(collector.basis)] = collector.basis
                else:
                    self._plain_step(param, group, noise)
        for key, basis in bases.items():
            self._basis_step(basis, members[key], idle[key], clip, noise)
        self._window.clear()
        self._global_step += 1
        self._mark_due()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and the samples that belong to them."""
        super().zero_grad(set_to_none)
        self._window.clear()

    def _all_finite(self) -> bool:
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        return not grads or bool(torch.isfinite(torch.nn.utils.get_total_norm(grads)).item())

    def _plain_step(self, param: Tensor, group: dict[str, Any], noise: NoiseTable) -> None:
        state = self.state[param]
        moments = moments_for(self._moments, param.numel(), param.dtype)
        if not state:
            state["step"] = torch.zeros(())
            state.update(moments.init(param.shape, param))
        assert param.grad is not None
        direction, _ = moments.advance(state, param.grad, _tick(state), group["betas"], group["eps"], noise)
        decay = 1.0 - float(group["lr"]) * group["weight_decay"]
        dense_update_(param, direction, -float(group["lr"]), decay, self._rounding(noise))

    def _rounding(self, noise: NoiseTable) -> NoiseTable | None:
        return noise if self._stochastic_rounding else None

    def _basis_step(
        self,
        basis: Basis,
        members: list[tuple[Collector, dict[str, Any]]],
        idle: list[tuple[Collector, dict[str, Any]]],
        clip: Tensor,
        noise: NoiseTable,
    ) -> None:
        """Steps every weight that shares ``basis``, then refreshes the basis where it is due.

        ``idle`` weights share it too but had no gradient in this window: only their moments move with the basis.
        """
        assert basis.matrix_NR is not None
        for collector, _ in members:
            if collector.probed_ML is not None and collector.coordinates.grad is not None:
                collector.share_inside = share_inside(collector.coordinates.grad, collector.probed_ML)
        steps = [_MemberStep(self, collector, group, clip, noise) for collector, group in members]
        new_NR = self._refreshed(basis, steps, clip)
        scale = (basis.width / basis.rank) ** 0.5
        for member in steps:
            left, right = member.finish(basis.matrix_NR, new_NR, noise)
            lr = float(member.group["lr"])
            weight_MN = self._weight_of[id(member.collector)]
            decay = 1.0 - lr * member.group["weight_decay"]
            low_rank_update_(weight_MN, left, right, -lr * scale, decay, self._rounding(noise))
        if new_NR is not None:
            for collector, group in idle:
                self._carry(collector, group, basis.matrix_NR, new_NR, noise)
            basis.matrix_NR = new_NR

    def _carry(self, collector: Collector, group: dict[str, Any], basis_NR: Tensor, new_NR: Tensor, noise: NoiseTable) -> None:
        """Moves a weight's moments from one basis to the next."""
        state = self.state.get(collector.coordinates)
        if not state:
            return
        shape = collector.coordinates.shape
        moments = moments_for(self._moments, collector.rows * collector.basis.rank, collector.coordinates.dtype)
        exp_avg_MR, exp_avg_sq_MR = moments.read(state, shape)
        rotation_RR = basis_NR.to(exp_avg_MR.dtype).T @ new_NR.to(exp_avg_MR.dtype)
        step, (beta1, beta2) = int(state["step"].item()), group["betas"]
        moved = transport_moments(exp_avg_MR, exp_avg_sq_MR, rotation_RR, 1.0 - beta1**step, 1.0 - beta2**step)
        moments.write(state, *moved, noise)

    def _refreshed(self, basis: Basis, steps: "list[_MemberStep]", clip: Tensor) -> Tensor | None:
        if not basis.due or basis.sketch_NR is None:
            return None
        assert basis.matrix_NR is not None
        sketch_NR = basis.sketch_NR.to(steps[0].direction_MR.dtype) * clip
        return refreshed_basis(sketch_NR, basis.matrix_NR)

    def _mark_due(self) -> None:
        """Chooses, round-robin, the bases that the next window refreshes and measures, and gives their collectors a probe."""
        for index, basis in enumerate(self._window.bases()):
            basis.due = (
                self._window.kind != "random"
                and basis.rank < basis.width
                and (self._global_step + index) % self._refresh_interval == 0
            )
            basis.probes_NK = None
            measured = (self._global_step + index) % (REFRESHES_A_MEASUREMENT * self._refresh_interval) == 0
            if basis.due and measured and basis.matrix_NR is not None:
                seed = self._window.generator.initial_seed() + (self._global_step << 20) + index
                basis.probes_NK = outside_probes(basis.matrix_NR, seed)
        for collector in self._window.collectors:
            collector.probe_MR = None
            state = self.state.get(collector.coordinates)
            if collector.basis.due and self._window.kind == "gradient":
                if not state:  # no gradient has reached this weight yet: it has no say in where the basis goes
                    continue
                moments = moments_for(self._moments, collector.rows * collector.basis.rank, collector.coordinates.dtype)
                exp_avg_MR, _ = moments.read(state, collector.coordinates.shape)
                collector.probe_MR = exp_avg_MR.to(collector.coordinates.dtype)

    # ---- what is saved --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and lists: loads with ``torch.load(…, weights_only=True)``."""
        bases = self._window.bases()
        index_of = {id(basis): index for index, basis in enumerate(bases)}
        saved = super().state_dict()
        saved["subspace"] = {
            "formats": self._formats(),
            "basis_of": [index_of[id(collector.basis)] for collector in self._window.collectors],
            "bases": [None if basis.matrix_NR is None else basis.matrix_NR for basis in bases],
            "generator": self._window.generator.get_state(),
            "shares_inside": self._shares_inside(),
            "global_step": self._global_step,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`. Unlike torch's own loader it never casts a state to the parameter's dtype."""
        if "subspace" not in state_dict:
            raise GradLiteError("the saved state is not a GradLite optimizer's: it has no 'subspace'.")
        saved = state_dict["subspace"]
        self._check_fits(saved)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        params = [param for group in self.param_groups for param in group["params"]]
        for index, state in state_dict["state"].items():
            param = params[index]
            self.state[param] = {
                name: value.clone() if name in ("step", "error_shape") else value.to(param.device, copy=True)
                for name, value in state.items()
            }
        self._restore_bases(saved)
        self._window.generator.set_state(saved["generator"].cpu())
        for collector, share in zip(self._window.collectors, saved["shares_inside"], strict=True):
            collector.share_inside = None if share is None else torch.tensor(share, dtype=torch.float64)
        self._global_step = saved["global_step"]
        self.skipped_steps = saved["skipped_steps"]
        self.skipped_in_a_row = saved["skipped_in_a_row"]
        self._window.clear()
        self._mark_due()

    def _shares_inside(self) -> list[float | None]:
        """Of every collector the newest share of its gradient's energy inside the basis, in one read from the device."""
        newest = [collector.share_inside for collector in self._window.collectors]
        known = [share.double() for share in newest if share is not None]
        values = iter(torch.stack(known).tolist() if known else [])
        shares = [None if share is None else next(values) for share in newest]
        return [share if share is not None and math.isfinite(share) else None for share in shares]

    def _formats(self) -> dict[str, str]:
        return {"feedback": self._feedback, "feedback_memory": self._feedback_memory, "moments": self._moments}

    def _check_fits(self, saved: dict[str, Any]) -> None:
        for name, here_format in self._formats().items():
            there_format = saved["formats"][name]
            if there_format != here_format:
                raise GradLiteError(
                    f"the saved optimizer has {name}={there_format!r}, this one {name}={here_format!r}; load it with the same."
                )
        there, here = saved["basis_of"], self._window.collectors
        if len(there) != len(here):
            raise GradLiteError(
                f"the saved optimizer has {len(there)} projected weights, this one has {len(here)}; "
                "load it with the same model, include and exclude."
            )
        for collector, index in zip(here, there, strict=True):
            matrix = saved["bases"][index]
            wanted = (collector.basis.width, collector.basis.rank)
            if matrix is not None and tuple(matrix.shape) != wanted:
                raise GradLiteError(
                    f"the saved optimizer has a basis of width {matrix.shape[0]} and rank {matrix.shape[1]} where this "
                    f"one has width {wanted[0]} and rank {wanted[1]}; load it with the same model and rank."
                )

    def _restore_bases(self, saved: dict[str, Any]) -> None:
        restored: dict[int, Basis] = {}
        for collector, index in zip(self._window.collectors, saved["basis_of"], strict=True):
            if index not in restored:
                restored[index] = Basis(collector.basis.width, collector.basis.rank)
                matrix = saved["bases"][index]
                if matrix is not None:
                    like = collector.coordinates
                    restored[index].matrix_NR = matrix.to(device=like.device, dtype=like.dtype, copy=True)
            collector.basis = restored[index]

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the tensors that exist now, by category; gradients and samples exist between backward and step."""
        counted: dict[str, int] = dict.fromkeys(_CATEGORIES, 0)
        counted["weights"] = sum(weight.nbytes for weight in self._weight_of.values())
        for group in self.param_groups:
            for param in group["params"]:
                if not isinstance(param, Coordinates):
                    counted["weights"] += param.nbytes
                if param.grad is not None:
                    counted["gradients"] += param.grad.nbytes
                for name, value in self.state.get(param, {}).items():
                    counted["error memory" if name.startswith("error") else "moments"] += value.nbytes
        for basis in self._window.bases():
            counted["basis"] += _nbytes(basis.matrix_NR, basis.sketch_NR, basis.probes_NK)
        for collector in self._window.collectors:
            counted["basis"] += _nbytes(collector.probe_MR, collector.probed_ML)
            if collector.sample is not None:
                counted["residual sample"] += sum(factor.nbytes for factor in collector.sample)
        return counted

    def expected_bytes(self) -> dict[str, int]:
        """The same categories from shapes alone, as they will stand between backward and step, sketches left out."""
        expected: dict[str, int] = dict.fromkeys(_CATEGORIES, 0)
        for group in self.param_groups:
            for param in group["params"]:
                if isinstance(param, Coordinates):
                    continue
                expected["weights"] += param.nbytes
                expected["gradients"] += param.nbytes
                moments = moments_for(self._moments, param.numel(), param.dtype)
                expected["moments"] += moments.nbytes(param.numel(), param.itemsize) + 4
        for basis in self._window.bases():
            expected["basis"] += basis.width * basis.rank * self._window.residual_norm.itemsize
        for collector in self._window.collectors:
            rows, width, rank = collector.rows, collector.basis.width, collector.basis.rank
            weight_MN = self._weight_of[id(collector)]
            moments = moments_for(self._moments, rows * rank, weight_MN.dtype)
            expected["weights"] += weight_MN.nbytes
            expected["gradients"] += rows * rank * weight_MN.itemsize
            expected["moments"] += moments.nbytes(rows * rank, weight_MN.itemsize) + 4
            if self._feedback != "off" and rank < width:
                expected["residual sample"] += collector.sample_count * (rows + width) * weight_MN.itemsize
            if self._feedback == "feedback" and rank < width:
                expected["error memory"] += self._memory.nbytes(rows, width, rank, weight_MN.itemsize)
        expected["gradients"] += self._window.residual_norm.itemsize
        return expected


_COPIED = (
    "_window", "_feedback", "_feedback_memory", "_refresh_interval", "_moments", "_stochastic_rounding", "_global_step",
    "skipped_steps", "skipped_in_a_row",
)  # fmt: skip
_CATEGORIES = ("weights", "gradients", "basis", "residual sample", "error memory", "moments")


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _tick(state: dict[str, Tensor]) -> int:
    state["step"] += 1
    return int(state["step"].item())


class _MemberStep:
    """One weight's way through a step: its direction first, its moments and memory once the basis is decided."""

    def __init__(
        self, optimizer: SubspaceAdamW, collector: Collector, group: dict[str, Any], clip: Tensor, noise: NoiseTable
    ) -> None:
        self.optimizer = optimizer
        self.collector = collector
        self.group = group
        coordinates = collector.coordinates
        assert coordinates.grad is not None
        self.state = optimizer.state[coordinates]
        self.moments = moments_for(optimizer._moments, collector.rows * collector.basis.rank, coordinates.dtype)
        if not self.state:
            self._init_state(coordinates)
        self.step = _tick(self.state)
        self.direction_MR, total = self.moments.advance(
            self.state, coordinates.grad, self.step, group["betas"], group["eps"], noise
        )
        if collector.sample is not None:
            self.sample_scale = self._sample_scale(coordinates.grad, total, clip)
            if self._remembers():
                optimizer._memory.add(self.state, collector.sample, self.sample_scale)

    def _sample_scale(self, grad: Tensor, total: Tensor, clip: Tensor) -> Tensor:
        """What makes the residual's sample an update: ``φκ``, and the factor by which the gradients were clipped."""
        grad_MR = grad.to(self.direction_MR.dtype)
        tiny = torch.finfo(grad_MR.dtype).tiny
        phi = torch.linalg.vector_norm(self.direction_MR) / torch.linalg.vector_norm(grad_MR).clamp_min(tiny)
        # A gradient that hardly enters the basis would make φ boundless; Adam's own mean unit 1/√v̂ bounds it.
        total = (total / (1.0 - self.group["betas"][1] ** self.step)).clamp_min(tiny)
        phi = torch.minimum(phi, PHI_LIMIT * (grad_MR.numel() / total).sqrt())
        return phi * clip.to(grad_MR.dtype) * self.collector.signal_share().to(grad_MR.dtype)

    def _init_state(self, coordinates: Coordinates) -> None:
        collector, optimizer = self.collector, self.optimizer
        self.state["step"] = torch.zeros(())
        self.state.update(self.moments.init(coordinates.shape, coordinates))
        if self._remembers():
            rank, width = collector.basis.rank, collector.basis.width
            like = coordinates.new_empty(0)
            self.state.update(optimizer._memory.init(collector.rows, width, rank, like))

    def _remembers(self) -> bool:
        return self.optimizer._feedback == "feedback" and self.collector.basis.rank < self.collector.basis.width

    def finish(self, basis_NR: Tensor, new_NR: Tensor | None, noise: NoiseTable) -> tuple[Tensor, Tensor]:
        """The weight's update as two factors, M×S and N×S; the moments move with the basis."""
        compute = self.direction_MR.dtype
        basis_NR = basis_NR.to(compute)
        left, right = [self.direction_MR], [basis_NR]
        sample = self.collector.sample
        if self.optimizer._feedback == "same_step" and sample is not None:
            left.append(sample.left_KM.to(compute).T * self.sample_scale)
            right.append(sample.right_KN.to(compute).T)
        if new_NR is not None:
            self.optimizer._carry(self.collector, self.group, basis_NR, new_NR, noise)
            if self._remembers():
                new_NR = new_NR.to(compute)
                left.append(self.optimizer._memory.release(self.state, new_NR).to(compute))
                right.append(new_NR)
        return (left[0], right[0]) if len(left) == 1 else (torch.cat(left, 1), torch.cat(right, 1))
