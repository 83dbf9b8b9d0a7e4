"""GradLite: attaches to a model and trains all of its weights. The optimizer that users build."""

import difflib
import inspect
import math
from collections.abc import Sequence
from typing import Any, Never

from torch import Tensor, nn

from gradlite.attaching import Coverage, attach, attachment_of, check_unchanged, detach
from gradlite.attaching.attachment import unwrapped
from gradlite.attaching.holding import Hold
from gradlite.attaching.patterns import matches, names_by_parameter
from gradlite.errors import GradLiteError
from gradlite.optim.member_step import Feedback
from gradlite.optim.moments import MomentsFormat
from gradlite.optim.saved_state import shares_inside
from gradlite.optim.subspace_adamw import MemoryFormat, SubspaceAdamW
from gradlite.subspace.collector import BasisKind

_CHOICES = {
    "feedback": ("feedback", "same_step", "off"),
    "feedback_memory": ("factored", "int4", "fp32"),
    "basis": ("gradient", "activation", "random"),
    "moments": ("int8", "fp32"),
}


class GradLite(SubspaceAdamW):
    """Full-parameter AdamW in low-rank coordinates, with error feedback. Source: docs/method.md.

    >>> optimizer = gradlite.GradLite(model, lr=1e-4, rank=1 / 16)
    >>> loss.backward()
    ... optimizer.step()
    ... optimizer.zero_grad()

    Accumulation, ``clip_grad_norm_(model.parameters(), …)``, schedulers and ``state_dict`` work as with any optimizer. The
    learning rate is AdamW's: the update in coordinates is scaled by ``(width/rank)^¼``.

    Args:
        model: attached in place (an earlier attachment is replaced).
        lr: learning rate. rank: of each basis; a whole number, or a fraction of the layer's input width.
        feedback: what becomes of the gradient outside the basis: ``"off"`` drops it (the basis still follows the exact
            gradient; the default, because it was the best measured: docs/log.md), ``"feedback"`` remembers a sample of it and
            releases what a later basis holds, ``"same_step"`` applies the sample at once.
        feedback_memory: ``"factored"`` (rank/4 factors), ``"int4"`` (0.53 bytes a parameter), ``"fp32"`` (exact).
        basis: ``"gradient"``, ``"activation"`` or ``"random"`` (static); refresh_interval: steps between two refreshes of
            one basis; the bases take turns.
        hold: how tensors wait for the backward pass; see :func:`gradlite.attach`.
        moments: ``"int8"`` codes or ``"fp32"``. betas, eps, weight_decay: AdamW's; norms and biases are not decayed.
        include, exclude: patterns on names of parameters or their layers for what is projected; the rest is trained plain.
        groups: ``[{"params": [patterns], "lr": …, "weight_decay": …}, …]``: param groups of their own, by name patterns.
        stochastic_rounding: of bfloat16 weights. seed: of bases, samples and rounding.

    One process and one device: bases and samples are not synchronised between processes.

    Raises:
        GradLiteError: an unknown keyword or choice, a bad rank or number, a pattern that matches nothing, nothing to project.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        rank: int | float = 1 / 16,
        *,
        feedback: Feedback = "off",
        feedback_memory: MemoryFormat = "factored",
        basis: BasisKind = "gradient",
        refresh_interval: int = 5,
        moments: MomentsFormat = "int8",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hold: Hold = "exact",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        groups: Sequence[dict[str, Any]] = (),
        stochastic_rounding: bool = True,
        seed: int = 0,
        **unknown: Never,  # type checkers refuse any; at run time the nearest keyword is named
    ) -> None:
        if unknown:
            raise GradLiteError(_unknown_keyword(next(iter(unknown))))
        check_choices(feedback=feedback, feedback_memory=feedback_memory, basis=basis, moments=moments)
        if not isinstance(model, nn.Module):
            raise GradLiteError(
                f"GradLite trains a torch.nn.Module, not {type(model).__name__}; pass the model, not its parameters."
            )
        check_numbers(lr, betas, eps, weight_decay, refresh_interval)
        self.coverage: Coverage = attach(
            model,
            rank=rank,
            basis=basis,
            sample_residual=feedback != "off",
            hold=hold,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        attachment = attachment_of(model)
        assert attachment is not None
        self._attachment = attachment
        self._model = model
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        try:
            param_groups = _param_groups(model, self.coverage, attachment.projected, attachment.window, defaults, groups)
        except GradLiteError:
            detach(model)  # or whichever optimizer is built next would see no gradients of what is projected
            raise
        super().__init__(
            param_groups,
            attachment.window,
            [weight for _, weight in attachment.projected],
            feedback=feedback,
            feedback_memory=feedback_memory,
            refresh_interval=refresh_interval,
            moments=moments,
            stochastic_rounding=stochastic_rounding,
        )
        self.defaults.update(defaults)  # for groups that are added later

    def __getstate__(self) -> dict[str, Any]:
        own = {"coverage": self.coverage, "_attachment": self._attachment, "_model": self._model}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For parameters of the model that were frozen when the optimizer was built. Raises GradLiteError for any other.

        Norms and biases, which are not decayed unless the group says how much, become a group of their own.
        """
        if hasattr(self, "_window"):  # torch's own constructor adds the first groups with this method
            params = param_group["params"]
            param_group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
            self._check_trainable(param_group["params"])
            if "weight_decay" not in param_group:
                vectors = [parameter for parameter in param_group["params"] if parameter.dim() < 2]
                param_group["params"] = [parameter for parameter in param_group["params"] if parameter.dim() >= 2]
                if vectors:
                    super().add_param_group({**param_group, "params": vectors, "weight_decay": 0.0})
                if not param_group["params"]:
                    return
        super().add_param_group(param_group)

    def _check_trainable(self, params: Sequence[Tensor]) -> None:
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        projected = {id(weight) for _, weight in self._attachment.projected}
        for parameter in params:
            if id(parameter) not in names:
                raise GradLiteError(
                    f"a parameter of shape {tuple(parameter.shape)} is not the model's, so GradLite cannot train it; "
                    "make it a part of the model before building the optimizer, or give it an optimizer of its own."
                )
            if id(parameter) in projected:
                raise GradLiteError(
                    f"{names[id(parameter)]!r} is trained in coordinates already; for settings of its own build the optimizer "
                    f'with groups=[{{"params": [{names[id(parameter)]!r}], …}}].'
                )

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`SubspaceAdamW.state_dict`, with the place in the noise that rounds held tensors."""
        own = {"hold": {"noise_reads": self._attachment.operators.noise.reads}, "projected": self._projected_names}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`. Raises GradLiteError for a state of other weights or of other settings."""
        there = state_dict.get("projected", self._projected_names)  # older states do not tell
        other = sorted(set(there) ^ set(self._projected_names))
        if other:
            where = "the saved optimizer" if other[0] in there else "this optimizer"
            raise GradLiteError(
                f"{other[0]!r} is trained in coordinates by {where} only; load it with the same model, include and exclude."
            )
        super().load_state_dict(state_dict)
        self._attachment.operators.noise.reads = int(state_dict.get("hold", {}).get("noise_reads", 0))

    @property
    def _projected_names(self) -> list[str]:
        return [name for name, _ in self._attachment.projected]

    def energy(self) -> dict[str, float]:
        """The newest measured share (0 to 1) of each projected weight's gradient energy inside its basis, by the weight's name.

        Estimated with random probes (:mod:`gradlite.subspace.energy`) in the window before every second refresh of a basis,
        so each weight's share is at most ``2·refresh_interval`` steps old. Left out: weights not measured yet, and those whose
        basis never moves or is of full rank.
        """
        shares = zip(self._projected_names, shares_inside(self._window.collectors), strict=True)
        return {name: share for name, share in shares if share is not None}

    def step(self, closure: Any = None) -> Any:
        """One update; see :meth:`SubspaceAdamW.step`.

        Raises GradLiteError once the model belongs to another optimizer, or its parameters are no longer those attached to.
        """
        if not self._attachment.active:
            raise GradLiteError("this optimizer's model was detached or attached anew; use the newest GradLite optimizer.")
        check_unchanged(self._model)
        return super().step(closure)


class optimizer_factory:  # noqa: N801 - used like a function, in the place of an optimizer class
    """For transformers: ``Trainer(…, optimizer_cls_and_kwargs=(gradlite.optimizer_factory, {"lr": …, "rank": …}))``.

    The Trainer calls ``optimizer_factory()(model, **kwargs)``: a factory gets the whole model, an optimizer class would get
    parameters only.
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> GradLite:
        return GradLite(model, **kwargs)


def _unknown_keyword(word: str) -> str:
    known = [name for name, p in inspect.signature(GradLite).parameters.items() if p.kind is not p.VAR_KEYWORD]
    guesses = difflib.get_close_matches(word.lower(), known, n=1)
    hint = f"did you mean {guesses[0]!r}?" if guesses else f"known are {', '.join(known[1:])}."
    return f"unknown keyword {word!r}; {hint}"


def check_choices(**chosen: object) -> None:
    """Raises GradLiteError for an unknown value of an option that has a few, and for two that exclude each other."""
    for key, value in chosen.items():
        if value not in _CHOICES[key]:
            raise GradLiteError(f"{key}={value!r} is unknown; choose one of {', '.join(map(repr, _CHOICES[key]))}.")
    if chosen.get("basis") == "random" and chosen.get("feedback") == "feedback":
        raise GradLiteError(
            'basis="random" never moves, so feedback="feedback" would never be released; '
            'use feedback="same_step" or "off" with it.'
        )


def check_numbers(
    lr: Any = 0.0,
    betas: Any = (0.0, 0.0),
    eps: Any = 1.0,
    weight_decay: Any = 0.0,
    refresh_interval: Any = 1,
    where: str = "",
) -> None:
    """Raises GradLiteError for a number out of its range; what is not given is in its range."""
    pair = tuple(betas) if isinstance(betas, (tuple, list)) else ()
    ranges: list[tuple[str, object, bool, str]] = [
        ("lr", lr, _is_number(lr) and lr >= 0.0, "a finite number, at least 0"),
        ("betas", betas, len(pair) == 2 and all(_is_number(one) and 0.0 <= one < 1.0 for one in pair), "two numbers in [0, 1)"),
        ("eps", eps, _is_number(eps) and eps > 0.0, "a finite number above 0"),
        ("weight_decay", weight_decay, _is_number(weight_decay) and weight_decay >= 0.0, "a finite number, at least 0"),
        (
            "refresh_interval",
            refresh_interval,
            type(refresh_interval) is int and refresh_interval >= 1,
            "a whole number from 1",
        ),
    ]
    for name, value, valid, wanted in ranges:
        if not valid:
            raise GradLiteError(f"{name}{where} must be {wanted}, not {value!r}.")


def _is_number(value: object) -> bool:
    """A tensor of one number counts: torch allows one as a learning rate."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _param_groups(
    model: nn.Module,
    coverage: Coverage,
    projected: list[tuple[str, nn.Parameter]],
    window: Any,
    defaults: dict[str, Any],
    overrides: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """One group for projected weights, one for plain matrices, one (undecayed) for norms and biases, and one an override.

    An override that has norms or biases and says nothing of ``weight_decay`` makes two groups: they stay undecayed.
    """
    trained: dict[str, Tensor] = {
        name: collector.coordinates for (name, _), collector in zip(projected, window.collectors, strict=True)
    }
    plain = {entry.name for entry in coverage.entries if entry.kind == "plain"}
    own = {name.removeprefix("_orig_mod."): parameter for name, parameter in model.named_parameters()}
    trained.update({name: own[name] for name in own if name in plain})
    names_of = names_by_parameter(unwrapped(model))
    groups: list[dict[str, Any]] = []
    for override in overrides:
        if "params" not in override:
            raise GradLiteError('a group needs "params", the name patterns of its parameters.')
        patterns = [override["params"]] if isinstance(override["params"], str) else list(override["params"])
        names = [name for name in trained if matches(names_of[id(own[name])], patterns)]
        if not names:
            raise GradLiteError(f"the group {patterns!r} matches no trained parameter that an earlier group left.")
        settings = {key: value for key, value in override.items() if key != "params"}
        unknown = set(settings) - set(defaults)
        if unknown:
            raise GradLiteError(f"unknown setting {min(unknown)!r} in a group; known: {', '.join(defaults)}.")
        check_numbers(**{**defaults, **settings}, where=f" in the group {patterns!r}")
        vectors = [] if "weight_decay" in settings else [name for name in names if name in plain and own[name].dim() < 2]
        others = [name for name in names if name not in vectors]
        if others:
            groups.append({**defaults, **settings, "params": [trained.pop(name) for name in others]})
        if vectors:
            groups.append({**defaults, **settings, "weight_decay": 0.0, "params": [trained.pop(name) for name in vectors]})
    names_by_kind = {
        "projected": [name for name in trained if name not in plain],
        "matrices": [name for name in trained if name in plain and own[name].dim() >= 2],
        "vectors": [name for name in trained if name in plain and own[name].dim() < 2],
    }
    for kind, names in names_by_kind.items():
        settings = {"weight_decay": 0.0} if kind == "vectors" else {}
        params = [trained[name] for name in names]
        if kind == "projected":  # clipping and loss scaling must reach the residual's norm as well
            params.append(window.residual_norm)
        if params:
            groups.append({**defaults, **settings, "params": params})
    return groups
