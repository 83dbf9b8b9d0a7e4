"""What one weight's backward pass leaves behind: the coordinates' gradient, a residual sample, and a refresh's sketch.

Shape suffixes: T tokens, M output width, N input width, R rank.

A *window* is what lies between two optimizer steps: one backward pass, or several under gradient accumulation. A
:class:`Collector` is the ``absorb`` that the subspace operators call; it adds each gradient of the window to what it holds.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradlite.ops.factors import GradientFactors
from gradlite.ops.precision import wide
from gradlite.subspace.basis import activation_basis, gradient_basis, pull_back, random_basis
from gradlite.subspace.energy import probed
from gradlite.subspace.residual import ResidualSample, merge_samples, sample_residual

BasisKind = Literal["gradient", "activation", "random"]


class Coordinates(nn.Parameter):
    """A place for ``C.grad`` (M×R): zeros without storage, one element expanded to the shape.

    It holds no value that could be trained or saved, so it counts as no parameter: ``numel()`` is 0 and sums over
    ``model.parameters()`` show the model's own count. Its ``.grad`` is an ordinary one.
    """

    def __new__(cls, shape: tuple[int, ...], like: Tensor) -> "Coordinates":
        data = torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)
        return torch.Tensor._make_subclass(cls, data, True)

    def numel(self) -> int:
        return 0

    def __deepcopy__(self, memo: dict[int, object]) -> "Coordinates":
        if id(self) not in memo:
            memo[id(self)] = _coordinates(tuple(self.shape), self, self.requires_grad)
        return memo[id(self)]  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _coordinates, (tuple(self.shape), torch.zeros((), dtype=self.dtype, device=self.device), self.requires_grad)

    def trained_with(self, weight: Tensor) -> "Coordinates":
        """Itself, asking for a gradient where the weight does, which may have been frozen, or freed, since it was attached."""
        self.requires_grad_(weight.requires_grad)
        return self

    def drop_storage(self) -> None:
        """Back to one expanded element, after ``.to()`` has made a full copy."""
        self.data = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


def _coordinates(shape: tuple[int, ...], like: Tensor, requires_grad: bool) -> Coordinates:
    coordinates = Coordinates(shape, like)
    coordinates.requires_grad_(requires_grad)
    return coordinates


class Basis:
    """One orthonormal basis ``matrix_NR``, shared by all weights that read the same tensor; None before the first batch."""

    def __init__(self, width: int, rank: int) -> None:
        self.width = width
        self.rank = rank
        self.matrix_NR: Tensor | None = None
        self.due = False
        """A refresh follows the current window: its backward passes must leave a sketch."""
        self.sketch_NR: Tensor | None = None
        self.probes_NK: Tensor | None = None
        """Directions outside the basis: while they are here, its weights measure their gradients' energy."""


class Window:
    """What the collectors of one model share: settings, the random generator, and the residual's norm.

    ``residual_norm`` is a one-element parameter whose ``.grad`` is the estimate of ``‖R‖`` over all weights of the window.
    Stock gradient clipping therefore sees the norm of the gradient with what the basis misses, and scales both; the
    optimizer reads the factor back from it, and no second backward pass is needed. The estimate is that of
    :meth:`Collector.residual_squared`, not ``‖R̂‖``: a sample of few tokens is several times longer than what it stands for.
    """

    def __init__(self, kind: BasisKind, sample_residual: bool, seed: int, like: Tensor) -> None:
        self.kind = kind
        self.sample_residual = sample_residual
        self.residual_norm = Coordinates((1,), like)
        self.generator = torch.Generator(device=like.device)
        self.generator.manual_seed(seed)
        self.collectors: list[Collector] = []
        self._squared_norm: Tensor | None = None
        self._recent: deque[tuple[weakref.ref[Tensor], int, Basis]] = deque(maxlen=8)

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        state["generator"] = (str(self.generator.device), self.generator.get_state())
        state["_recent"] = deque(maxlen=8)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        device, generator_state = state["generator"]
        self.generator = torch.Generator(device=device)
        self.generator.set_state(generator_state)

    def bases(self) -> list[Basis]:
        """Every basis once, in the order of the collectors."""
        return list({id(collector.basis): collector.basis for collector in self.collectors}.values())

    def open_if_cleared(self) -> None:
        """In a forward pass: starts a new window if the gradients were cleared since the last backward pass."""
        if self._squared_norm is not None and not in_backward() and self._was_cleared():
            self.clear()

    def _was_cleared(self) -> bool:
        """By ``model.zero_grad()``; its ``set_to_none=False`` leaves a zero where a sample's norm stood."""
        grad = self.residual_norm.grad
        if grad is None or self._squared_norm is None:
            return True
        return grad._version > 0 and bool((grad == 0).all())

    def clear(self) -> None:
        """Forgets the window's samples and sketches (after a step, or when gradients are cleared)."""
        self._squared_norm = None
        self.residual_norm.grad = None
        for collector in self.collectors:
            collector.sample, collector.diagonal, collector.num_tokens = None, None, 0
            collector.probed_ML = None
        for basis in self.bases():
            basis.sketch_NR = None

    def note_norm(self, change: Tensor | None) -> None:
        """Adds to ``‖R̂‖²``; called once for every absorbed gradient, so that a backward pass always leaves its mark."""
        if self._squared_norm is None:
            self._squared_norm = torch.zeros(1, dtype=torch.promote_types(self.residual_norm.dtype, torch.float32))
            self._squared_norm = self._squared_norm.to(self.residual_norm.device)
        if change is not None:
            self._squared_norm = self._squared_norm + change.to(self._squared_norm.dtype)
        self.residual_norm.grad = self._norm().to(self.residual_norm.dtype)

    def _norm(self) -> Tensor:
        assert self._squared_norm is not None
        # The estimate may come out negative, and is zero where nothing is sampled; a tiny positive norm still lets the clip
        # factor be read from the gradient, and what was scaled be told from what was cleared.
        floor = torch.finfo(self._squared_norm.dtype).tiny ** 0.5
        return self._squared_norm.clamp_min(floor).sqrt()

    def clip_factor(self) -> Tensor:
        """What the gradients were multiplied by since backward (clipping, loss unscaling): a scalar tensor, 1 if nothing."""
        grad = self.residual_norm.grad
        if grad is None or self._squared_norm is None:
            return torch.ones((), device=self.residual_norm.device)
        norm = self._norm()
        # Compared in the gradient's own format: its rounding must not look like a clip.
        norm = norm.to(grad.dtype).to(norm.dtype)
        return torch.where(norm > 0, grad.to(norm.dtype) / norm, torch.ones_like(norm)).squeeze(0)

    def follow(self, device: torch.device) -> None:
        """Draws from a generator on the model's device, seeded from the one so far: no numbers come twice."""
        if self.generator.device != device:
            seed = torch.randint(2**32, (), generator=self.generator, device=self.generator.device)
            moved = torch.Generator(device=device).manual_seed(int(seed))
            self.generator = moved

    def share_basis(self, collector: "Collector", x: Tensor) -> None:
        """Before the first batch: joins collectors that read the same tensor object, at the same version of it."""
        for reference, version, basis in self._recent:
            if reference() is x and version == x._version and basis.width == collector.basis.width:
                if basis.rank == collector.basis.rank and basis.matrix_NR is None:
                    collector.basis = basis
                return
        self._recent.append((weakref.ref(x), x._version, collector.basis))


def in_backward() -> bool:
    """Whether autograd is running (a checkpointed block's second forward pass happens there)."""
    return torch._C._current_graph_task_id() != -1


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a + b``, where None stands for nothing yet."""
    return b if a is None else a if b is None else a + b


def _wide_sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """In float32 or wider."""
    return _sum(None if a is None else wide(a), b)


class Absorbed(NamedTuple):
    """What one gradient leaves behind. ``sample`` and ``diagonal`` are None where no residual is sampled."""

    gradient_MR: Tensor
    sketch_NR: Tensor | None = None
    probed_ML: Tensor | None = None
    sample: ResidualSample | None = None
    diagonal: Tensor | None = None
    num_tokens: int = 0

    def scaled(self, factor: Tensor) -> "Absorbed":
        """Of ``factor`` times the gradient (a scalar tensor)."""
        sketch = None if self.sketch_NR is None else self.sketch_NR * factor.to(self.sketch_NR.dtype)
        probes = None if self.probed_ML is None else self.probed_ML * factor.to(self.probed_ML.dtype)
        sample, diagonal = self.sample, self.diagonal
        if sample is not None and diagonal is not None:
            sample = ResidualSample(sample.left_KM * factor.to(sample.left_KM.dtype), sample.right_KN)
            diagonal = diagonal * factor.to(diagonal.dtype).square()
        gradient_MR = self.gradient_MR * factor.to(self.gradient_MR.dtype)
        return Absorbed(gradient_MR, sketch, probes, sample, diagonal, self.num_tokens)


class Collector:
    """Absorbs the gradients of one M×N weight. ``rows`` = M; one for both uses of a tied embedding."""

    def __init__(self, window: Window, rows: int, width: int, rank: int, sample_count: int, like: Tensor) -> None:
        self.window = window
        self.rows = rows
        self.sample_count = sample_count
        self.basis = Basis(width, rank)
        self.coordinates = Coordinates((rows, rank), like)
        self.sample: ResidualSample | None = None
        self.diagonal: Tensor | None = None
        """``Σ_t w_t²`` over the window's tokens, a scalar."""
        self.num_tokens = 0
        self.probe_MR: Tensor | None = None
        """While the basis is due: the first moment's direction, the left side of the power iteration."""
        self.probed_ML: Tensor | None = None
        """The window's gradient, seen through the basis' probes."""
        self.share_inside: Tensor | None = None
        """The newest share of the gradient's energy inside the basis, a scalar."""
        window.collectors.append(self)

    def reads(self, x: Tensor) -> None:
        """Called by a layer's forward pass with its input, before the operator."""
        if self.basis.matrix_NR is None and torch.is_grad_enabled():
            self.window.share_basis(self, x)
        self.window.open_if_cleared()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Takes the basis along when a module moves to another device or dtype (idempotent: several layers share one)."""
        if self.basis.matrix_NR is not None:
            self.basis.matrix_NR = fn(self.basis.matrix_NR)
        if self.basis.probes_NK is not None:
            self.basis.probes_NK = fn(self.basis.probes_NK)
        if self.share_inside is not None:
            self.share_inside = self.share_inside.to(self.coordinates.device)
        self.window.follow(self.coordinates.device)

    def __call__(self, factors: GradientFactors) -> Tensor:
        """Absorbs one gradient; returns the coordinates' gradient ``G P`` (M×R) in the coordinates' dtype."""
        return self.take(self.measure(factors))

    def project(self, x_TN: Tensor) -> Tensor | None:
        """The input's coordinates ``xP``, or None where backward needs ``x`` itself: for a sketch, a sample, a first basis."""
        matrix_NR = self.basis.matrix_NR
        needs_x = self.basis.due or self.basis.probes_NK is not None or self.window.sample_residual
        if matrix_NR is None or needs_x:
            return None
        return x_TN @ matrix_NR.to(x_TN.dtype)

    def absorb_projected(self, grad_TM: Tensor, inside_TR: Tensor) -> Tensor:
        """Absorbs one gradient from its input's coordinates; returns the coordinates' gradient ``δᵀ(xP)``."""
        with torch.autocast(grad_TM.device.type, enabled=False):
            gradient_MR = (grad_TM.T @ inside_TR.to(grad_TM.dtype)).to(self.coordinates.dtype)
        return self.take(Absorbed(gradient_MR))

    def measure(self, factors: GradientFactors) -> "Absorbed":
        """What one gradient leaves behind, not yet added to the window. The first one ever makes the basis."""
        with torch.autocast(factors.right_TN.device.type, enabled=False):  # backward may run inside the user's autocast
            right_TN = factors.right_TN
            matrix_NR = self.basis.matrix_NR
            if matrix_NR is None:
                matrix_NR = self._first_basis(factors).to(self.coordinates.dtype)
                if bool(torch.isfinite(matrix_NR).all()):  # or the step will be skipped, and the next batch makes the basis
                    self.basis.matrix_NR = matrix_NR
            basis_NR = matrix_NR.to(right_TN.dtype)
            inside_TR = right_TN @ basis_NR
            gradient_MR = factors.left_t_matmul(inside_TR).to(self.coordinates.dtype)
            sketch_NR = self._sketch(factors, inside_TR) if self.basis.due else None
            probes_NK = self.basis.probes_NK
            probed_ML = None if probes_NK is None else probed(factors, gradient_MR, probes_NK)
            if not (self.window.sample_residual and self.basis.rank < self.basis.width):
                return Absorbed(gradient_MR, sketch_NR, probed_ML, None, None, 0)
            sample = sample_residual(factors, basis_NR, inside_TR, self.sample_count, self.window.generator)
            return Absorbed(gradient_MR, sketch_NR, probed_ML, *sample, right_TN.shape[0])

    def join(self, a: "Absorbed", b: "Absorbed") -> "Absorbed":
        """The sum of two gradients, as if they had come at once (their samples are thinned to one's size).

        In float32 or wider: of many, a sum in a short format loses more with every one.
        """
        sketch, probes = _wide_sum(a.sketch_NR, b.sketch_NR), _sum(a.probed_ML, b.probed_ML)
        gradient_MR = wide(a.gradient_MR) + b.gradient_MR
        if a.sample is None or b.sample is None or a.diagonal is None or b.diagonal is None:
            return Absorbed(gradient_MR, sketch, probes, None, None, 0)
        sample = merge_samples(a.sample, b.sample, self.sample_count, self.window.generator)
        return Absorbed(gradient_MR, sketch, probes, sample, a.diagonal + b.diagonal, a.num_tokens + b.num_tokens)

    def leaves(self, absorbed: "Absorbed") -> tuple[Tensor | None, ...]:
        """Its tensors, in the formats that a single gradient has, to be saved for backward."""
        dtype = self.coordinates.dtype
        sketch_NR = None if absorbed.sketch_NR is None else absorbed.sketch_NR.to(dtype)
        sample = (None, None) if absorbed.sample is None else absorbed.sample
        return absorbed.gradient_MR.to(dtype), sketch_NR, absorbed.probed_ML, *sample, absorbed.diagonal

    def of_leaves(self, leaves: Sequence[Tensor | None], num_tokens: int) -> "Absorbed":
        """What :meth:`leaves` took apart; ``num_tokens``: of the gradient."""
        gradient_MR, sketch_NR, probed_ML, left_KM, right_KN, diagonal = leaves
        assert gradient_MR is not None
        if left_KM is None or right_KN is None:
            return Absorbed(gradient_MR, sketch_NR, probed_ML)
        return Absorbed(gradient_MR, sketch_NR, probed_ML, ResidualSample(left_KM, right_KN), diagonal, num_tokens)

    def take(self, absorbed: "Absorbed") -> Tensor:
        """Adds it to the window; returns the coordinates' gradient."""
        self.basis.sketch_NR = _sum(self.basis.sketch_NR, absorbed.sketch_NR)
        self.probed_ML = _sum(self.probed_ML, absorbed.probed_ML)
        change = None
        if absorbed.sample is not None and absorbed.diagonal is not None:
            before = None if self.sample is None else self.residual_squared()[0]
            sample, diagonal = absorbed.sample, absorbed.diagonal
            self.num_tokens += absorbed.num_tokens
            if self.sample is not None and self.diagonal is not None:
                sample = merge_samples(self.sample, sample, self.sample_count, self.window.generator)
                diagonal = self.diagonal + diagonal
            self.sample, self.diagonal = sample, diagonal
            after = self.residual_squared()[0]
            change = after if before is None else after - before
        self.window.note_norm(change)
        return absorbed.gradient_MR

    def _first_basis(self, factors: GradientFactors) -> Tensor:
        start_NR = random_basis(self.basis.width, self.basis.rank, self.window.generator, factors.right_TN)
        if self.window.kind == "random":
            return start_NR
        if self.window.kind == "activation":
            return activation_basis(factors.right_TN, start_NR)
        return gradient_basis(factors, start_NR)

    def _sketch(self, factors: GradientFactors, inside_TR: Tensor) -> Tensor | None:
        if self.window.kind == "activation":
            return factors.right_TN.T @ inside_TR
        if self.probe_MR is None:  # no gradient had reached this weight when the basis became due
            return None
        return pull_back(factors, self.probe_MR.to(factors.right_TN.dtype))

    def residual_squared(self) -> tuple[Tensor, Tensor]:
        """The window's estimate of ``‖R‖²`` (may be negative), and ``‖R̂‖²``: scalars in float32 or wider.

        ``‖R‖² = Σ_t w_t² + Σ_{s≠t} ⟨term_s, term_t⟩``. The first sum is known from every token. The second is estimated by
        the sample's own pairs; two of K tokens are drawn together about (K−1)/K times as often as if independently.
        ``‖R̂‖²`` is larger than ``‖R‖²`` by the sample's variance: tenfold and more on SmolLM2 at rank n/16.
        """
        assert self.sample is not None
        assert self.diagonal is not None
        total, off_diagonal = self.sample.norms_squared()
        count = len(self.sample.left_KM)
        if count < self.num_tokens:
            off_diagonal = off_diagonal * (count / (count - 1) if count > 1 else 0.0)
        return self.diagonal + off_diagonal, total

    def signal_share(self) -> Tensor:
        """``κ = Σ_t w_t² / Σ_s (w_s/π_s)²`` in (0, 1]: the tokens' own squares over the sample's.

        ``κR̂`` is close to the multiple of ``R̂`` that is nearest to ``R`` in the mean square where tokens are as good as
        uncorrelated, and shorter where they agree; 1 where every token was taken. The estimate of
        :meth:`residual_squared` is no use here: its noise is as large as ``‖R̂‖²``, so that long samples would be kept long.
        """
        assert self.sample is not None
        assert self.diagonal is not None
        total, off_diagonal = self.sample.norms_squared()
        sampled = total - off_diagonal
        tiny = torch.finfo(sampled.dtype).tiny
        return torch.where(sampled > 0, self.diagonal / sampled.clamp_min(tiny), 1.0).clamp(0.0, 1.0)
