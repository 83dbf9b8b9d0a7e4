"""What attaching did to every parameter: nothing is skipped silently."""

from dataclasses import dataclass
from typing import Literal

from gradlite.attaching.held import HeldCoverage

Kind = Literal["projected", "plain", "frozen"]


@dataclass(frozen=True)
class Entry:
    """One parameter. ``rank`` is None unless it is projected; ``num_bytes`` are those of its values."""

    name: str
    kind: Kind
    reason: str
    rank: int | None
    num_elements: int
    num_bytes: int


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a model once, in the model's order.

    *projected*: trained in coordinates. *plain*: trained with its exact gradient by AdamW. *frozen*: was frozen, stays so.
    ``held``: what waits for the backward pass, and how.
    """

    entries: tuple[Entry, ...]
    held: HeldCoverage

    def num_elements(self, kind: Kind | None = None) -> int:
        """Parameters of one kind, or all."""
        return sum(entry.num_elements for entry in self.entries if kind in (None, entry.kind))

    def num_bytes(self, kind: Kind | None = None) -> int:
        """Bytes of the values of one kind, or all."""
        return sum(entry.num_bytes for entry in self.entries if kind in (None, entry.kind))

    def __str__(self) -> str:
        total = max(1, self.num_elements())
        lines = []
        for kind in ("projected", "plain", "frozen"):
            entries = [entry for entry in self.entries if entry.kind == kind]
            if not entries:
                continue
            elements, size = sum(e.num_elements for e in entries), sum(e.num_bytes for e in entries)
            reasons = sorted({entry.reason for entry in entries})
            lines.append(
                f"{kind}: {len(entries)} tensors, {elements:,} parameters ({100 * elements / total:.2f} %), "
                f"{size / 2**20:,.1f} MiB ({'; '.join(reasons)})"
            )
        return "\n".join([*lines, str(self.held)])
