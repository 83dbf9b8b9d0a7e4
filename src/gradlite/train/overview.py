"""What a run is going to do, shown before it does it."""

from collections.abc import Iterator

from rich.table import Table

from gradlite.attaching.coverage import Kind
from gradlite.methods.gradlite import GradLite
from gradlite.methods.method import Method
from gradlite.train.config import TrainConfig
from gradlite.train.data import Data
from gradlite.train.words import in_bytes, in_count

_KINDS: tuple[tuple[Kind, str], ...] = (
    ("projected", "trained through the basis"),
    ("plain", "trained by AdamW"),
    ("frozen", "not trained"),
)


def overview(config: TrainConfig, data: Data, method: Method, device: str, num_sequences: int, steps: int) -> Table:
    """Parameters by kind, bytes by category, and the amount of work. `num_sequences`: rows after packing."""
    model = method.model
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    count = sum(parameter.numel() for parameter in model.parameters())
    table.add_row("model", f"{config.model}: {in_count(count)} parameters, {config.dtype}, on {device}")
    rows = _attached_rows(method.optimizer) if isinstance(method.optimizer, GradLite) else _method_rows(method)
    for title, text in rows:
        table.add_row(title, text)
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


def coverage_of(method: Method) -> str:
    """What becomes of the parameters, one kind a line."""
    if isinstance(method.optimizer, GradLite):
        return str(method.optimizer.coverage)
    return "\n".join(f"{title}: {text}" for title, text in _method_rows(method))


def state_bytes_of(method: Method) -> dict[str, int]:
    """What training holds, by category; GradLite's are finer."""
    return method.optimizer.state_bytes() if isinstance(method.optimizer, GradLite) else method.state_bytes()


def _attached_rows(optimizer: GradLite) -> Iterator[tuple[str, str]]:
    coverage = optimizer.coverage
    for kind, what in _KINDS:
        entries = [entry for entry in coverage.entries if entry.kind == kind]
        ranks = sorted({entry.rank for entry in entries if entry.rank})
        rank_text = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
        yield (
            kind,
            f"{in_count(coverage.num_elements(kind))} parameters in {len(entries)} tensors, "
            f"{in_bytes(coverage.num_bytes(kind))}, {what}{rank_text}",
        )
    expected = optimizer.expected_bytes()
    parts = ", ".join(f"{category.replace('_', ' ')} {in_bytes(size)}" for category, size in expected.items())
    yield "memory", f"{in_bytes(sum(expected.values()))} without activations: {parts}"
    held = coverage.held
    yield (
        "activations",
        f"{held.bytes_per_token:,} bytes a token wait for backward ({', '.join(dict.fromkeys(e.mode for e in held.entries))})"
        + (f"; {len(held.unrecognised)} modules not recognised" if held.unrecognised else "")
        + ("; loss in tiles, without full logits" if held.is_loss_tiled else ""),
    )


def _method_rows(method: Method) -> Iterator[tuple[str, str]]:
    trained = {id(parameter) for parameter in method.trained()}
    for title, wanted in ((f"trained by {method.name}", True), ("not trained", False)):
        chosen = [parameter for parameter in method.model.parameters() if (id(parameter) in trained) == wanted]
        size = sum(parameter.nbytes for parameter in chosen)
        count = sum(parameter.numel() for parameter in chosen)
        if chosen:
            yield title, f"{in_count(count)} parameters in {len(chosen)} tensors, {in_bytes(size)}"
