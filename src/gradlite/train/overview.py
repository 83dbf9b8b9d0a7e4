"""What a run is going to do, shown before it does it."""

from rich.table import Table

import gradlite
from gradlite.attaching.coverage import Kind
from gradlite.train.config import TrainConfig
from gradlite.train.data import Data
from gradlite.train.words import in_bytes, in_count

_KINDS: tuple[tuple[Kind, str], ...] = (
    ("projected", "trained through the basis"),
    ("plain", "trained by AdamW"),
    ("frozen", "not trained"),
)


def overview(
    config: TrainConfig, data: Data, optimizer: "gradlite.GradLite", device: str, num_sequences: int, steps: int
) -> Table:
    """Parameters by kind, bytes by category, and the amount of work. `num_sequences`: rows after packing."""
    coverage = optimizer.coverage
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("model", f"{config.model}: {in_count(coverage.num_elements())} parameters, {config.dtype}, on {device}")
    for kind, what in _KINDS:
        entries = [entry for entry in coverage.entries if entry.kind == kind]
        ranks = sorted({entry.rank for entry in entries if entry.rank})
        rank_text = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
        table.add_row(
            kind,
            f"{in_count(coverage.num_elements(kind))} parameters in {len(entries)} tensors, "
            f"{in_bytes(coverage.num_bytes(kind))}, {what}{rank_text}",
        )
    expected = optimizer.expected_bytes()
    parts = ", ".join(f"{category.replace('_', ' ')} {in_bytes(size)}" for category, size in expected.items())
    table.add_row("memory", f"{in_bytes(sum(expected.values()))} without activations: {parts}")
    held = coverage.held
    table.add_row(
        "activations",
        f"{held.bytes_per_token:,} bytes a token wait for backward ({', '.join(dict.fromkeys(e.mode for e in held.entries))})"
        + (f"; {len(held.unrecognised)} modules not recognised" if held.unrecognised else "")
        + ("; loss in tiles, without full logits" if held.is_loss_tiled else ""),
    )
    table.add_row(
        "data",
        f"{len(data.train):,} examples ({', '.join(data.columns)}), {in_count(data.num_tokens)} tokens; "
        f"{len(data.held_out):,} held out",
    )
    in_step = config.batch_size * config.accumulation
    tokens_in_step = data.num_tokens / num_sequences * in_step
    table.add_row(
        "steps",
        f"{steps:,} of {config.accumulation} × {config.batch_size} sequences, about {in_count(steps * tokens_in_step)} tokens",
    )
    return table
