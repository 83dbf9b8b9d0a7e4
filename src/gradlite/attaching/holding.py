"""The ways of holding that users name, and which module gets which.

``exact``, ``int8``, ``int4``: what operators keep. ``host``: the same as ``exact``, in the host's memory. ``projected``: as
``exact``, but a linear layer whose input nothing else keeps holds the input's coordinates ``xP`` (the paper's literal
scheme). ``recompute``, ``recompute-int8``, ``recompute-mapped``: only a block's input is kept, as it is, in codes or in
memory-mapped files, and the block runs again in backward (its operators then keep exact tensors, of one block at a time).
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gradlite.errors import GradLiteError
from gradlite.hold.codec import EXACT, INT4, INT8, Codec

HoldMode = Literal["exact", "int8", "int4", "projected", "host", "recompute", "recompute-int8", "recompute-mapped"]
Hold = HoldMode | Mapping[str, HoldMode]
"""One mode, or ``{pattern: mode}``: the first pattern that matches the name of a module or of one of its parents decides."""


@dataclass(frozen=True)
class Mode:
    """``codec``: of what operators keep. ``boundary``: of a replayed block's input; None where blocks are not replayed."""

    name: HoldMode
    codec: Codec
    boundary: Codec | None = None
    is_projected: bool = False
    is_on_host: bool = False
    boundary_is_mapped: bool = False


MODES: dict[str, Mode] = {
    "exact": Mode("exact", EXACT),
    "int8": Mode("int8", INT8),
    "int4": Mode("int4", INT4),
    "projected": Mode("projected", EXACT, is_projected=True),
    "host": Mode("host", EXACT, is_on_host=True),
    "recompute": Mode("recompute", EXACT, EXACT),
    "recompute-int8": Mode("recompute-int8", EXACT, INT8),
    "recompute-mapped": Mode("recompute-mapped", EXACT, EXACT, boundary_is_mapped=True),
}


class HoldPlan:
    """Looks up the mode of a module by its name."""

    def __init__(self, hold: Hold) -> None:
        if not isinstance(hold, (str, Mapping)) or not all(isinstance(pattern, str) for pattern in [*hold]):
            raise GradLiteError(f"hold={hold!r} is neither a way of holding nor a mapping of module patterns to such.")
        named = {"*": hold} if isinstance(hold, str) else dict(hold)
        for mode in named.values():
            if mode not in MODES:
                raise GradLiteError(f"hold={mode!r} is unknown; choose one of {', '.join(map(repr, get_args(HoldMode)))}.")
        if "int4" in named.values():
            warnings.warn(INT4_WARNING, stacklevel=4)
        self._rules = [(pattern, _expression(pattern), MODES[mode]) for pattern, mode in named.items()]
        self._used: set[str] = set()

    def names(self, mode: HoldMode) -> bool:
        """Whether some rule gives this mode."""
        return any(rule.name == mode for _, _, rule in self._rules)

    def mode_of(self, name: str) -> Mode:
        """The mode of the module called ``name``; ``exact`` where no pattern matches."""
        pattern, mode = self._rule_of(name)
        self._used.add(pattern)
        return mode

    def _rule_of(self, name: str) -> tuple[str, Mode]:
        parts = name.split(".")
        ancestors = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        for pattern, expression, mode in self._rules:
            if pattern == "*" or any(expression.fullmatch(ancestor) for ancestor in ancestors):
                return pattern, mode
        return "", MODES["exact"]

    def check_used(self, names: Sequence[str], blocks: Sequence[str]) -> None:
        """Raises GradLiteError if a pattern matched no module so far, and none of those called ``names`` either.

        ``blocks``: names of what can be replayed; a pattern that asks for that must match one of them.
        """
        for name in names:
            self.mode_of(name)
        example = names[len(names) // 2]
        replayed = {self._rule_of(block)[0] for block in blocks}
        for pattern, _, mode in self._rules:
            if mode.boundary is not None and pattern != "*" and pattern in self._used and pattern not in replayed:
                like = f"blocks are called {blocks[0]!r} and so on" if blocks else "this model has none"
                raise GradLiteError(
                    f"the hold pattern {pattern!r} asks for {mode.name!r}, which whole blocks can do only; {like}."
                )
            if pattern not in self._used and pattern != "*":
                raise GradLiteError(
                    f"the hold pattern {pattern!r} decides about no module (it matches none, or an earlier pattern took them); "
                    f"names look like {example!r}, * stands for anything and [0-15] for a range of numbers."
                )


def _expression(pattern: str) -> re.Pattern[str]:
    """``*`` is anything; ``[a-b]`` and ``[a,b]`` are numbers."""
    pieces = []
    for piece in re.split(r"(\*|\[[0-9,\- ]+\])", pattern):
        if piece == "*":
            pieces.append(".*")
        elif piece.startswith("["):
            numbers: set[int] = set()
            for part in piece[1:-1].split(","):
                ends = [int(end) for end in part.split("-")]
                numbers.update(range(ends[0], ends[-1] + 1))
            pieces.append("(?:" + "|".join(str(number) for number in sorted(numbers)) + ")")
        else:
            pieces.append(re.escape(piece))
    return re.compile("".join(pieces))


INT4_WARNING = (
    "hold='int4' turns the gradient: on SmolLM2-135M its cosine with the exact one was 0.72 (int8: 0.999); "
    "use int8 or recompute unless you have measured that it does."
)
