"""The summary: sentences made from the numbers, and from nothing else."""

from collections.abc import Callable, Iterable

from gradlite.compare.record import Record
from gradlite.report.energy import energy_of
from gradlite.report.read import TrainedRun
from gradlite.report.rows import Group, Row
from gradlite.report.words import counted, in_loss, in_memory, in_percent
from gradlite.train.words import in_time


def of_group(group: Group) -> list[str]:
    """What was run, the lowest loss, the least memory, the fastest, and what has no result."""
    said = [_work(group), _lowest_loss(group), _least_memory(group), _fastest(group), _without_result(group)]
    return [sentence for sentence in said if sentence]


def of_run(run: TrainedRun) -> list[str]:
    """How far the run came, its losses, memory and speed, and the gradient's energy at the end."""
    result, config = run.result, run.config
    finished = result.get("status") == "finished"
    steps, _ = run.series("step")  # a skipped step has a line, but no loss
    said = []
    if config:
        method = f", method {config['method']}" if "method" in config else ""
        work = f"{config.get('model')} on {config.get('dataset')}{method}"
        state = "finished" if finished else "not finished, as far as metrics.jsonl goes"
        said.append(f"{work}, {counted(int(max(steps, default=0)), 'step')}: {state}.")
    _, losses = run.series("eval_loss")
    if len(losses) > 1 and losses[0]:
        tokens = f" ({result['held_out_tokens']:,} tokens)" if isinstance(result.get("held_out_tokens"), int) else ""
        verb = "fell" if losses[-1] < losses[0] else "rose"
        change = in_percent(losses[-1] / losses[0] - 1)
        said.append(
            f"The held-out loss{tokens} {verb} from {in_loss(losses[0])} to {in_loss(losses[-1])} nats per token ({change})."
        )
        if min(losses) < losses[-1]:
            said.append(f"It was lowest, {in_loss(min(losses))}, before the end.")
    _, peaks = run.series("peak_memory_bytes")
    _, rates = run.series("tokens_per_second")
    if peaks and rates:
        took = f"; {in_time(result['seconds'])} in all" if isinstance(result.get("seconds"), int | float) else ""
        said.append(f"Peak memory {in_memory(max(peaks))}; {rates[-1]:,.0f} tokens/s at the end{took}.")
    _, skipped = run.series("skipped_steps")
    if skipped and skipped[-1]:
        said.append(f"{counted(int(skipped[-1]), 'step')} skipped, because a loss or a gradient was not finite.")
    energy = energy_of(run.metrics)
    if energy is not None:
        last = {name: share for name, share in zip(energy.layers, energy.inside[-1], strict=True) if share is not None}
        least = min(last, key=lambda name: last[name])
        mean = sum(last.values()) / len(last)
        said.append(
            f"At step {energy.steps[-1]} the bases held {100 * mean:.1f} % of the gradient's energy, "
            f"the mean over layers; least in {least}, {100 * last[least]:.1f} %."
        )
    return said


def _work(group: Group) -> str:
    records = group.records
    batches = {f"batches of {r.batch_size} × {r.seq_len} tokens" for r in records}
    parts = [
        counted(len(group.rows), "method"),
        counted(len(records), "run"),
        _only(f"{r.model} on {r.dataset}" for r in records),
        _only(r.dtype for r in records),
        batches.pop() if len(batches) == 1 else "",
        _only(counted(r.steps, "step") for r in records),
    ]
    return ", ".join(part for part in parts if part) + "."


def _only(values: Iterable[str]) -> str:
    """What all of them say, or nothing."""
    found = set(values)
    return found.pop() if len(found) == 1 else ""


def _lowest_loss(group: Group) -> str:
    judged = sorted(((row.loss.mean, row) for row in group.rows if row.loss), key=lambda pair: pair[0])
    if not judged:
        return ""
    loss, best = judged[0]
    own = best.loss
    assert own is not None
    seeds = f", mean of {own.count} seeds" if own.count > 1 else ""
    told = f"Lowest held-out loss: {best.name} with {loss:.4f} nats per token (learning rate {best.best[0].lr:g}{seeds})"
    if len(judged) == 1:
        return told + "."
    _, second = judged[1]
    other = second.loss
    assert other is not None
    apart = ", their seeds overlap" if own.count > 1 and other.count > 1 and other.low <= own.high else ""
    told += f"; next is {second.name} with {other.mean:.4f}{apart}"
    reference = group.reference
    if reference is not None and reference.loss and reference not in (best, second):
        told += f"; {reference.name} has {reference.loss.mean:.4f}"
    return told + "."


def _least_memory(group: Group) -> str:
    known = [(row.peak_bytes, row) for row in group.rows if row.peak_bytes is not None]
    if not known:
        return ""
    peak, least = min(known, key=lambda pair: pair[0])
    told = (
        f"Least peak memory: {least.name} with {in_memory(peak)}, {in_memory(least.peak_above_weights_bytes)} above the weights"
    )
    return told + _beside(group, least, told=lambda row: in_memory(row.peak_bytes)) + "."


def _fastest(group: Group) -> str:
    known = [(row.tokens_per_second, row) for row in group.rows if row.tokens_per_second]
    if not known:
        return ""
    rate, fastest = max(known, key=lambda pair: pair[0])
    told = f"Fastest: {fastest.name} with {rate:,.0f} tokens/s"
    return told + _beside(group, fastest, told=_speed) + "."


def _speed(row: Row) -> str:
    return f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "nothing measured"


def _beside(group: Group, winner: Row, told: Callable[[Row], str]) -> str:
    reference = group.reference
    if reference is None or reference is winner:
        return ""
    return f"; {reference.name} has {told(reference)}"


def _without_result(group: Group) -> str:
    failed: list[Record] = [record for row in group.rows for record in row.failures]
    if not failed:
        return ""
    told = "; ".join(dict.fromkeys(f"{record.name} ({_why(record)})" for record in failed))
    verb = "has" if len(failed) == 1 else "have"
    return f"{len(failed)} of {counted(len(group.records), 'run')} {verb} no result: {told}."


def _why(record: Record) -> str:
    status = record.status.replace("_", " ")
    return f"{status}: {record.reason.rstrip('.')}" if record.reason else status
