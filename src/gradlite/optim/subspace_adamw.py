"""AdamW in coordinates, with error feedback and moving bases: the loop over pure per-tensor steps.

Shape suffixes: M output width, N input width, R rank, K sampled tokens.

For every projected weight, in one step (docs/method.md, sections 3 to 5):

1. ``Ũ`` (M×R): AdamW's direction from ``C.grad`` and the coordinates' moments.
2. the residual sample goes, in update units ``φ = ‖Ũ‖/‖C.grad‖`` and shrunk to its signal ``κ``, to the error memory
   (``feedback``) or at once to the weight (``same_step``).
3. where the basis is due: it is refreshed from the window's sketch ``GᵀΨ``, the moments move along, and what the memory
   holds inside the new basis is released to the weight.
4. one fused write: ``W ← (1 − ηλ)W − η s [Ũ Pᵀ + (eP')P'ᵀ]``, ``s = (n/r)^¼``, rounded stochastically in bfloat16.

This module knows tensors and collectors; models belong to :mod:`gradlite.attaching` and :mod:`gradlite.methods`.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradlite.errors import GradLiteError
from gradlite.ops.random_state import seed_of
from gradlite.optim.adam import subspace_scale
from gradlite.optim.member_step import Feedback, MemberStep, SubspaceStep, carry_moments, tick
from gradlite.optim.moments import MomentsFormat, moments_for
from gradlite.optim.rounding import NoiseTable, dense_update_, low_rank_update_
from gradlite.optim.saved_state import check_fits, restore_window, saved_window
from gradlite.optim.state_bytes import bytes_now, bytes_to_come
from gradlite.subspace.basis import exponent_of, refreshed_basis
from gradlite.subspace.collector import Basis, Collector, Coordinates, Window
from gradlite.subspace.energy import outside_probes, share_inside
from gradlite.subspace.feedback import ErrorMemory, FactoredMemory, FullMemory, Int4Memory

REFRESHES_A_MEASUREMENT = 2
"""At every second refresh of a basis the gradient's energy inside it is measured: at each it took 0.6 % of a step's time."""

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
        weights: the projected weight (M×N, or stacked E×M×N) of every collector, in the window's order.

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
        self._moments: MomentsFormat = moments
        self._follow(window, weights)
        self._refresh_interval = refresh_interval
        self._stochastic_rounding = stochastic_rounding
        self._global_step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0

    def _follow(self, window: Window, weights: list[Tensor]) -> None:
        self._window = window
        self._collector_of = {id(c.coordinates): c for c in window.collectors}
        self._weight_of = dict(zip((id(c) for c in window.collectors), weights, strict=True))
        memory = error_memory(self._feedback_memory, lambda: window.generator)
        self._subspace_step = SubspaceStep(self._moments, self._feedback, memory)

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
        with torch.autocast(self._window.residual_norm.device.type, enabled=False):  # bases and moments keep their formats
            self._step()
        return loss

    def _step(self) -> None:
        if not self._all_finite():
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            self._window.clear()
            return
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and the samples that belong to them."""
        super().zero_grad(set_to_none)
        self._window.clear()

    def _all_finite(self) -> bool:
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        # Squares of finite float16 numbers may be infinite; the largest of them is not.
        norm_type = torch.inf if any(grad.dtype == torch.float16 for grad in grads) else 2.0
        return not grads or bool(torch.isfinite(torch.nn.utils.get_total_norm(grads, norm_type)).item())

    def _plain_step(self, param: Tensor, group: dict[str, Any], noise: NoiseTable) -> None:
        state = self.state[param]
        moments = moments_for(self._moments, param.numel(), param.dtype)
        if not state:
            state["step"] = torch.zeros(())
            state.update(moments.init(param.shape, param))
        assert param.grad is not None
        direction, _ = moments.advance(state, param.grad, tick(state), group["betas"], group["eps"], noise)
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
        steps = [
            MemberStep(self._subspace_step, self.state[collector.coordinates], collector, group, clip, noise)
            for collector, group in members
        ]
        new_NR = self._refreshed(basis, steps, clip)
        scale = subspace_scale(basis.width, basis.rank)
        for member in steps:
            left, right = member.finish(basis.matrix_NR, new_NR, noise)
            lr = float(member.group["lr"])
            weight_MN = self._weight_of[id(member.collector)]
            decay = 1.0 - lr * member.group["weight_decay"]
            low_rank_update_(weight_MN, left, right, -lr * scale, decay, self._rounding(noise))
        if new_NR is not None:
            for collector, group in idle:
                state = self.state.get(collector.coordinates)
                if state:
                    moments = self._subspace_step.moments_of(collector)
                    carry_moments(moments, collector, state, group["betas"], basis.matrix_NR, new_NR, noise)
            basis.matrix_NR = new_NR

    def _refreshed(self, basis: Basis, steps: list[MemberStep], clip: Tensor) -> Tensor | None:
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
                and self._global_step > 0  # a state may be loaded before the first step, as accelerate does
                and basis.rank < basis.width
                and (self._global_step + index) % self._refresh_interval == 0
            )
            basis.probes_NK = None
            measured = (self._global_step + index) % (REFRESHES_A_MEASUREMENT * self._refresh_interval) == 0
            if basis.due and measured and basis.matrix_NR is not None:
                seed = seed_of(self._window.generator.initial_seed() % 2**63, self._global_step, index)
                basis.probes_NK = outside_probes(basis.matrix_NR, seed)
        probes: dict[int, list[tuple[Collector, Tensor]]] = defaultdict(list)
        for collector in self._window.collectors:
            collector.probe_MR = None
            state = self.state.get(collector.coordinates)
            if collector.basis.due and self._window.kind == "gradient":
                if not state:  # no gradient has reached this weight yet: it has no say in where the basis goes
                    continue
                exp_avg_MR, _ = self._subspace_step.moments_of(collector).read(state, collector.coordinates.shape)
                probes[id(collector.basis)].append((collector, exp_avg_MR))
        for of_basis in probes.values():
            exponent = exponent_of(*(exp_avg_MR for _, exp_avg_MR in of_basis))
            for collector, exp_avg_MR in of_basis:  # the sketch's length means nothing, and float16 has no small numbers
                collector.probe_MR = torch.ldexp(exp_avg_MR, -exponent).to(collector.coordinates.dtype)

    # ---- what is saved --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and lists: loads with ``torch.load(…, weights_only=True)``."""
        saved = super().state_dict()
        saved["subspace"] = {
            "formats": self._formats(),
            **saved_window(self._window),
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
        check_fits(self._window, self._formats(), saved)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        params = [param for group in self.param_groups for param in group["params"]]
        for index, state in state_dict["state"].items():
            param = params[index]
            self.state[param] = {
                name: value.clone() if name in ("step", "error_shape") else value.to(param.device, copy=True)
                for name, value in state.items()
            }
        restore_window(self._window, saved)
        self._global_step = saved["global_step"]
        self.skipped_steps = saved["skipped_steps"]
        self.skipped_in_a_row = saved["skipped_in_a_row"]
        self._window.clear()
        self._mark_due()

    def _formats(self) -> dict[str, str]:
        own = {"feedback": self._feedback, "feedback_memory": self._feedback_memory, "moments": self._moments}
        return {**own, "basis": self._window.kind}

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the tensors that exist now, by category; gradients and samples exist between backward and step."""
        return bytes_now(self.param_groups, self.state, self._window, list(self._weight_of.values()))

    def expected_bytes(self) -> dict[str, int]:
        """The same categories from shapes alone, as they will stand between backward and step, sketches left out."""
        weights = [self._weight_of[id(collector)] for collector in self._window.collectors]
        return bytes_to_come(self.param_groups, self._window, weights, self._subspace_step)


_COPIED = (
    "_window", "_feedback", "_feedback_memory", "_refresh_interval", "_moments", "_stochastic_rounding", "_global_step",
    "skipped_steps", "skipped_in_a_row",
)  # fmt: skip
