"""How a figure was made, in lines that the page shows beneath it: everything from the records, nothing from this machine."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gradlite.compare.record import Record
from gradlite.report.read import TrainedRun
from gradlite.report.words import counted
from gradlite.train.words import in_bytes


class Origin(NamedTuple):
    """``facts``: (what, told how); ``commands``: each once."""

    facts: list[tuple[str, str]]
    commands: list[str]


def of_records(records: Sequence[Record]) -> Origin:
    """Of the records that a figure shows."""
    dates = sorted({record.date for record in records if record.date})
    facts = [
        ("versions", _each(_versions(record.versions) for record in records)),
        ("machine", _each(_machine(record.machine) for record in records)),
        ("date", _span(dates)),
        ("records", f"{counted(len(records), 'run')}: {', '.join(record.run for record in records)}"),
    ]
    return Origin(facts, list(dict.fromkeys(record.command for record in records if record.command)))


def of_run(run: TrainedRun) -> Origin:
    """Of a directory of `gradlite train`, whose config.yaml repeats it."""
    facts = [
        ("read from", f"metrics.jsonl and run.json of {run.name}"),
        ("versions", _versions(run.result.get("versions") or {}) or "not recorded (the run is not finished)"),
        ("machine", _machine(run.result.get("machine") or {}) or "not recorded"),
        ("date", str(run.result.get("date") or "not recorded")),
    ]
    return Origin(facts, ["gradlite train --config config.yaml"])


def _each(texts: Iterable[str]) -> str:
    return "; or ".join(dict.fromkeys(text for text in texts if text)) or "not recorded"


def _span(dates: Sequence[str]) -> str:
    if not dates:
        return "not recorded"
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _machine(machine: Mapping[str, Any]) -> str:
    known = {key: value for key, value in machine.items() if value is not None}
    return ", ".join(
        f"{key.removesuffix('_bytes').replace('_', ' ')} {in_bytes(value) if key.endswith('_bytes') else value}"
        for key, value in known.items()
    )
