"""Draws the records of benchmarks/mesp.py: peak memory above the weights, and step time against MeBP.

python benchmarks/mesp_figure.py benchmarks/results/mesp.jsonl --out benchmarks/results/mesp.png
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

NAMES = {
    "eager": "eager",
    "mebp": "MeBP",
    "mebp-tiled": "MeBP, tiled head",
    "mesp-storing-h": "structured, storing h",
    "mesp": "MeSP",
    "mesp-every-second": "MeSP, every second input",
}
REFERENCES = {"mebp": "MeBP", "mebp-tiled": "MeBP, tiled head"}


def draw(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Two panels: megabytes on a logarithmic axis, and MeSP's step time over MeBP's."""
    cells = sorted({(record["shape"], record["length"]) for record in records})
    by_cell = {(record["shape"], record["length"], record["method"]): record for record in records if record["base"] != "int4"}
    figure, (memory, speed) = plt.subplots(2, 1, figsize=(10, 7), height_ratios=(2, 1), layout="constrained")
    methods = [name for name in NAMES if any(key[2] == name for key in by_cell)]
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        places = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(cells))]
        heights = [by_cell.get((*cell, method), {}).get("peak_bytes", 0) / 1e6 for cell in cells]
        bars = memory.bar(places, heights, width, label=NAMES[method])
        memory.bar_label(bars, [f"{height:.0f}" if height else "" for height in heights], fontsize=6)
    memory.set_yscale("log")
    memory.set_ylabel("peak above the weights (MB)")
    memory.legend(ncols=6, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    for reference, name in REFERENCES.items():
        pairs = [(place, ratio(by_cell, cell, reference)) for place, cell in enumerate(cells)]
        known = [(place, value) for place, value in pairs if value is not None]
        speed.plot([place for place, _ in known], [value for _, value in known], "o", label=f"MeSP over {name}")
    speed.axhline(1.1, color="grey", linewidth=0.8)
    speed.set_ylabel("step time, ratio")
    speed.legend(fontsize=8)
    for axes in (memory, speed):
        name_cells(axes, cells)
    figure.savefig(out, dpi=120)


def ratio(by_cell: dict[tuple[str, int, str], dict[str, Any]], cell: tuple[str, int], reference: str) -> float | None:
    """Medians of steps that took turns."""
    ours, theirs = by_cell.get((*cell, "mesp")), by_cell.get((*cell, reference))
    if ours is None or theirs is None or not ours["step_seconds"] or not theirs["step_seconds"]:
        return None
    return statistics.median(ours["step_seconds"]) / statistics.median(theirs["step_seconds"])


def name_cells(axes: Axes, cells: Sequence[tuple[str, int]]) -> None:
    """Shape and length under each place."""
    axes.set_xticks(range(len(cells)), [f"{shape.upper()}\n{length} tokens" for shape, length in cells], fontsize=8)
    axes.set_xlim(-0.6, len(cells) - 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw([json.loads(line) for line in arguments.records.read_text().splitlines()], arguments.out)


if __name__ == "__main__":
    main()
