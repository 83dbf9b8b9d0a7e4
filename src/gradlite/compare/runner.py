"""Does what is still to be done of a comparison: each run in a process of its own, one at a time, one record each.

A run whose record is there is not done again, so a comparison that was stopped goes on where it stopped.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gradlite.compare.experiment import Experiment, MethodEntry
from gradlite.compare.record import Record, read_record, write_record
from gradlite.compare.runs import BAD_INPUT, NOTICE, STEP, RunSpec, further_seeds, num_runs, other_work, same_work, sweep
from gradlite.errors import GradLiteError
from gradlite.methods import check_options
from gradlite.train.files import check_writable
from gradlite.train.local_names import check_dataset, check_model
from gradlite.train.words import in_bytes, in_time
from gradlite.validation import shown

_SECONDS_TO_END = 10.0


class Runner:
    """Runs experiments into ``output_dir / "records"``; what workers print goes to ``output_dir / "logs"``.

    ``command``: the user's, for the records. ``on_record`` is called after every run with all records of the directory.
    """

    def __init__(
        self,
        output_dir: Path,
        command: str,
        console: Console,
        on_record: Callable[[Sequence[Record]], None],
        retry_failed: bool = False,
    ) -> None:
        self._output_dir = output_dir
        self.records_dir = output_dir / "records"
        self._logs_dir = output_dir / "logs"
        self._command = command
        self._console = console
        self._on_record = on_record
        self._retry_failed = retry_failed
        self._records: dict[str, Record] = {}
        self._files: dict[Path, tuple[tuple[int, int, int], Record]] = {}  # as they were when they were read
        self._seconds: dict[str, list[float]] = {}  # of the runs done now, by experiment

    def check(self, experiments: Sequence[Experiment]) -> None:
        """Raises GradLiteError for a place that cannot be written to, a model or data set that can only be a path and is not
        there, an option that no model could have, and a record that is there and belongs to other work.

        Costs next to nothing, so it comes first.
        """
        check_writable(self._output_dir)
        for experiment in experiments:
            check_model(experiment.model)
            check_dataset(experiment.dataset)
            for entry in experiment.methods:
                if entry.options:  # without any there is nothing to check, and no need for torch
                    _check_options(experiment, entry)
            for record in self.records:
                if record.experiment == experiment.name:
                    self._refuse(same_work(experiment, record), other_work(experiment, record), record)
            for spec in sweep(experiment):
                self.found(spec)

    def found(self, spec: RunSpec) -> Record | None:
        """The record of a run that needs not be done (again): its own, or one that another experiment made of the same work.

        What was once taken over is taken anew: its own record may have been deleted, or replaced by a later run's.
        """
        path = self.records_dir / f"{spec.run}.json"
        if not path.exists():
            return self._found_elsewhere(spec)
        record = read_record(path)
        if self._retry_failed and record.status != "ok":  # whatever it was a record of: an option that was corrected, say
            return None
        self._refuse(spec, spec.differs_from(record), record)
        return record if record.taken_from is None else self._found_elsewhere(spec)

    def _refuse(self, spec: RunSpec, key: str | None, record: Record) -> None:
        """Raises GradLiteError for a record that is of other work in ``key``, unless it failed and is to be done anew."""
        failed = record.status != "ok"
        if key is None or (self._retry_failed and failed):
            return
        name = key.removesuffix("_fingerprint")
        values = ", not ".join(map(shown, _values(key, record, spec.record("ok"))))
        told = f"its {name} differ{'' if name.endswith('s') else 's'}: {values}"
        what = told if name == key else f"the content of its {name} differs"
        remedy = "give --retry-failed, which does failed runs anew" if failed else "delete it"
        path = self.records_dir / f"{record.run}.json"
        raise GradLiteError(f"{path} is the record of other work ({what}); choose another --output-dir, or {remedy}.")

    def _found_elsewhere(self, spec: RunSpec) -> Record | None:
        """Only of other experiments: rows of one experiment that do the same were asked for twice."""
        made = (record for record in self.records if record.taken_from is None and record.status == "ok")
        others = (record for record in made if record.experiment != spec.experiment)
        return next((named for record in others if (named := spec.named_here(record)) is not None), None)

    @property
    def records(self) -> list[Record]:
        """All of the directory as it is now: another call may write into it, too."""
        there = [record for path in sorted(self.records_dir.glob("*.json")) if (record := self._read(path)) is not None]
        return list({**{record.run: record for record in there}, **self._records}.values())

    def _read(self, path: Path) -> Record | None:
        """A file that has not changed is not read again; None for one that is gone: its run is being done anew."""
        try:
            found = path.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if path not in self._files or self._files[path][0] != stamp:
                self._files[path] = (stamp, read_record(path))
        except (FileNotFoundError, GradLiteError):
            if path.exists():
                raise
            return None
        return self._files[path][1]

    def run(self, experiments: Sequence[Experiment]) -> list[Record]:
        """The experiments' records, in the order of the runs. A run that fails is a record with its reason."""
        self.check(experiments)
        with self._screen() as show:
            for number, experiment in enumerate(experiments):
                later = experiments[number + 1 :]
                for spec in sweep(experiment):
                    self._settle(spec, experiment, later, show)
                for spec in further_seeds(experiment, list(self._records.values())):
                    self._settle(spec, experiment, later, show)
        return list(self._records.values())

    def _settle(
        self, spec: RunSpec, experiment: Experiment, later: Sequence[Experiment], show: Callable[[Text, bool], None]
    ) -> None:
        record = self.found(spec)
        if record is None:
            own = sum(1 for name in self._records.values() if name.experiment == experiment.name)
            before = len(self._records)
            total = before - own + sum(num_runs(one) for one in (experiment, *later))
            heading = f"run {before + 1} of {total}  {spec.label}  rate {spec.lr:g}  seed {spec.seed}"
            show(Text(heading), False)
            began = time.perf_counter()
            record = self._do(
                spec, lambda step: show(_line(heading, spec, step, self._left(experiment, later, own, began)), True)
            )
            self._seconds.setdefault(experiment.name, []).append(time.perf_counter() - began)
            show(Text.assemble(f"{heading}  ", _outcome(record)), False)
        elif record.taken_from is not None:
            write_record(self.records_dir, record)
        self._records[record.run] = record
        self._on_record(self.records)

    def _left(self, experiment: Experiment, later: Sequence[Experiment], own: int, began: float) -> float | None:
        """Seconds until all is done, from the mean of the runs done now; None before any is."""
        known = [seconds for runs in self._seconds.values() for seconds in runs]
        if not known:
            return None
        mine = self._seconds.get(experiment.name, known)
        here = max(0.0, sum(mine) / len(mine) * (num_runs(experiment) - own) - (time.perf_counter() - began))
        return here + sum(known) / len(known) * sum(num_runs(one) for one in later)

    def _do(self, spec: RunSpec, on_step: Callable[[Mapping[str, Any]], None]) -> Record:
        path = self.records_dir / f"{spec.run}.json"
        if path.exists():
            path.unlink()
            self._on_record(self.records)  # the tables must not show it if this is interrupted
        self._logs_dir.mkdir(parents=True, exist_ok=True)
        log = self._logs_dir / f"{spec.run}.log"
        with tempfile.TemporaryDirectory() as scratch, log.open("w", encoding="utf-8") as errors:
            file = Path(scratch) / "spec.json"
            file.write_text(spec.model_dump_json(), encoding="utf-8")
            arguments = ["-m", "gradlite.compare.worker", str(file), str(self.records_dir), self._command]
            code = _run_process([sys.executable, *arguments], errors, on_step)
        if path.exists():
            return read_record(path)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = [line for line in lines if not line.startswith(NOTICE)]
        if code == BAD_INPUT and said:
            raise GradLiteError(said[-1])
        record = _without_word(spec, code, said)
        write_record(self.records_dir, record)
        return record

    @contextmanager
    def _screen(self) -> Iterator[Callable[[Text, bool], None]]:
        """A function that shows a line: one that stays, or one that the next replaces (not shown off a terminal)."""
        if not self._console.is_terminal:
            yield lambda line, passing: None if passing else self._console.print(line)
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:

            def show(line: Text, passing: bool) -> None:
                if passing:
                    live.update(line, refresh=True)
                else:
                    self._console.print(line)

            yield show


def _check_options(experiment: Experiment, entry: MethodEntry) -> None:
    try:
        check_options(entry.method, entry.options)
    except GradLiteError as error:
        raise GradLiteError(f"{experiment.name}, row {entry.label!r}: {error}") from None


def _values(key: str, *records: Record) -> list[object]:
    """What each of the records says of a key that its run was asked for; of options those that are not the same."""
    if key != "options":
        return [getattr(record, key) for record in records]
    names = {name for record in records for name in record.options if name != "max_grad_norm"}
    differ = {name for name in names if len({repr(record.options.get(name)) for record in records}) > 1}
    return [{name: value for name, value in record.options.items() if name in differ} for record in records]


def _run_process(command: Sequence[str], errors: Any, on_step: Callable[[Mapping[str, Any]], None]) -> int:
    """Run a worker to its end and return its exit code; if this process is interrupted, the worker is ended first."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,  # so that Ctrl-C reaches this process alone
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(STEP):
                on_step(json.loads(line.removeprefix(STEP)))
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()


def _without_word(spec: RunSpec, code: int, said: Sequence[str]) -> Record:
    """The record of a worker that ended without leaving one."""
    if code == -signal.SIGKILL:
        return spec.record("out_of_memory", "the system ended the process (SIGKILL), most likely because memory ran out")
    how = f"signal {-code} ended the process" if code < 0 else f"the process ended with exit code {code}"
    return spec.record("failed", f"{how}: {said[-1].strip()}" if said else how)


def _line(heading: str, spec: RunSpec, step: Mapping[str, Any], left: float | None) -> Text:
    parts = [
        heading,
        f"step {step['step']}/{spec.steps}",
        f"loss {step['loss']:.4f}",
        f"peak in all {in_bytes(step['peak_bytes'])}",
        f"{step['tokens_per_second']:,.0f} tokens/s",
    ]
    return Text("  ".join(parts if left is None else [*parts, f"left {in_time(left)}"]))


def _outcome(record: Record) -> Text:
    if record.status != "ok":
        return Text(f"{record.status.replace('_', ' ')}: {record.reason}", style="red")
    parts = []
    if record.final_held_out_loss is not None:
        parts.append(f"held-out loss {record.final_held_out_loss:.4f}")
    if record.memory is not None:
        parts.append(f"peak above weights {in_bytes(record.memory.peak_above_weights_bytes)}")
    if record.tokens_per_second is not None:
        parts.append(f"{record.tokens_per_second.median:,.0f} tokens/s")
    return Text("  ".join(parts) or "done", style="green")
