"""A rank asked for, turned into the rank of one layer."""

import warnings

from gradlite.errors import GradLiteError


def layer_rank(rank: int | float, width: int) -> int:
    """The rank of a layer whose input is ``width`` wide: an int as it is (at most the width), a fraction of the width.

    Raises:
        GradLiteError: a rank below 1, or a fraction outside (0, 1].
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != rank:
        raise GradLiteError(f"rank must be a whole number or a fraction of the input width, not {rank!r}.")
    if isinstance(rank, int):
        if rank < 1:
            raise GradLiteError(f"rank must be at least 1, not {rank}; give e.g. rank=1/16 or rank=64.")
        return min(rank, width)
    if not 0.0 < rank <= 1.0:
        raise GradLiteError(
            f"a fractional rank is a share of the input width and must lie in (0, 1], not {rank}; "
            "for a fixed rank give a whole number, e.g. rank=64."
        )
    return max(1, round(rank * width))


def warn_if_clipped(rank: int | float, widths: list[int]) -> None:
    """One warning that names how many layers are narrower than the rank asked for."""
    narrow = [width for width in widths if isinstance(rank, int) and rank > width]
    if narrow:
        warnings.warn(
            f"rank {rank} is above the input width of {len(narrow)} layers (narrowest {min(narrow)}); "
            "there the rank is the width.",
            stacklevel=3,
        )
