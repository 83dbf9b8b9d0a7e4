"""What an optimizer's ``state_dict`` says of bases and collectors, and how it comes back: plain tensors, numbers, lists."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradlite.errors import GradLiteError
from gradlite.subspace.collector import Basis, Collector, Window


def saved_window(window: Window) -> dict[str, Any]:
    """Of the collectors: which basis is whose, the bases, the shares of energy inside them; and the random generator."""
    bases = window.bases()
    index_of = {id(basis): index for index, basis in enumerate(bases)}
    return {
        "basis_of": [index_of[id(collector.basis)] for collector in window.collectors],
        "bases": [basis.matrix_NR for basis in bases],
        "generator": window.generator.get_state(),
        "shares_inside": shares_inside(window.collectors),
    }


def restore_window(window: Window, saved: Mapping[str, Any]) -> None:
    """Undoes :func:`saved_window`, after :func:`check_fits`.

    The state of a CPU's generator means nothing to a CUDA device's, and the other way round: there the run goes on with other
    random numbers than it would have had, and equally good ones.
    """
    _restore_bases(window.collectors, saved)
    generator_state = saved["generator"].cpu()
    if generator_state.numel() == window.generator.get_state().numel():
        window.generator.set_state(generator_state)
    else:
        window.generator.manual_seed(int(generator_state.long().sum()))
    shares = saved.get("shares_inside", [None] * len(window.collectors))  # states written before they were kept have none
    for collector, share in zip(window.collectors, shares, strict=True):
        device = collector.coordinates.device  # shares are stacked, so they must lie together
        collector.share_inside = None if share is None else torch.tensor(share, dtype=torch.float64, device=device)


def shares_inside(collectors: Sequence[Collector]) -> list[float | None]:
    """Of every collector the newest share of its gradient's energy inside the basis, in one read from the device."""
    newest = [collector.share_inside for collector in collectors]
    known = [share.double() for share in newest if share is not None]
    values = iter(torch.stack(known).tolist() if known else [])
    shares = [None if share is None else next(values) for share in newest]
    return [share if share is not None and math.isfinite(share) else None for share in shares]


def check_fits(window: Window, here_formats: Mapping[str, str], saved: Mapping[str, Any]) -> None:
    """Raises GradLiteError, with the remedy, where a saved state belongs to another model or other settings."""
    for name, here_format in here_formats.items():
        there_format = saved["formats"].get(name, here_format)  # older states do not tell the basis
        if there_format != here_format:
            raise GradLiteError(
                f"the saved optimizer has {name}={there_format!r}, this one {name}={here_format!r}; load it with the same."
            )
    there, here = saved["basis_of"], window.collectors
    if len(there) != len(here):
        raise GradLiteError(
            f"the saved optimizer has {len(there)} projected weights, this one has {len(here)}; "
            "load it with the same model, include and exclude."
        )
    for collector, index in zip(here, there, strict=True):
        matrix = saved["bases"][index]
        wanted = (collector.basis.width, collector.basis.rank)
        here_double = collector.coordinates.dtype == torch.float64
        if matrix is not None and (matrix.dtype == torch.float64) != here_double:  # whose moments have other formats
            raise GradLiteError(
                f"the saved optimizer trained weights in {_name(matrix.dtype)}, this one has them in "
                f"{_name(collector.coordinates.dtype)}; load it for a model in the same format."
            )
        if matrix is not None and tuple(matrix.shape) != wanted:
            raise GradLiteError(
                f"the saved optimizer has a basis of width {matrix.shape[0]} and rank {matrix.shape[1]} where this "
                f"one has width {wanted[0]} and rank {wanted[1]}; load it with the same model and rank."
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _restore_bases(collectors: Sequence[Collector], saved: Mapping[str, Any]) -> None:
    restored: dict[int, Basis] = {}
    for collector, index in zip(collectors, saved["basis_of"], strict=True):
        if index not in restored:
            restored[index] = Basis(collector.basis.width, collector.basis.rank)
            matrix = saved["bases"][index]
            if matrix is not None:
                like = collector.coordinates
                restored[index].matrix_NR = matrix.to(device=like.device, dtype=like.dtype, copy=True)
        collector.basis = restored[index]
