"""What a comparison keeps of one run: one JSON object, one file, every figure's unit in its name.

What was not measured is null. Importing this module is light: no torch, no transformers.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gradlite.errors import GradLiteError
from gradlite.train.files import write_json
from gradlite.validation import in_words

Status = Literal["ok", "failed", "out_of_memory"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Curve(_Part):
    """The training loss (nats per labelled token; null where it was not finite) of each step, 1 to the last.

    ``seconds``: since training began, at the end of each step, evaluation in between left out.
    """

    step: list[int] = []
    train_loss: list[float | None] = []
    seconds: list[float] = []

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if not len(self.step) == len(self.train_loss) == len(self.seconds):
            raise ValueError("step, train_loss and seconds differ in length")
        return self


class HeldOut(_Part):
    """Mean cross-entropy in nats per labelled token over the held-out rows, after ``step`` steps."""

    step: int
    loss: float | None
    seconds: float


class Spread(_Part):
    """Of several measurements of the same thing."""

    median: float
    min: float
    max: float


class ByCategory(_Part):
    """Bytes of live tensors by what they are for."""

    weights: int
    gradients: int
    optimizer_state: int
    held_activations: int
    temporaries: int


class Memory(_Part):
    """Memory of one training step. ``by_category_bytes``: at the moment of the peak; on a CPU it adds up to ``peak_bytes``, on
    CUDA, where the peak is the allocator's, ``note`` says where it does not.

    ``process_peak_above_weights_bytes``: growth of the process's anonymous memory, on a CPU. ``note``: what a reader must
    know, such as that the two peaks differ by more than a tenth.
    """

    peak_bytes: int
    peak_above_weights_bytes: int
    by_category_bytes: ByCategory | None = None
    process_peak_above_weights_bytes: int | None = None
    note: str | None = None


class Energy(_Part):
    """The share (0 to 1) of each layer's gradient energy inside its basis: ``inside[i][j]`` at step i, layer j."""

    steps: list[int]
    layers: list[str]
    inside: list[list[float | None]]

    @model_validator(mode="after")
    def _one_row_a_step(self) -> Self:
        if len(self.inside) != len(self.steps) or any(len(row) != len(self.layers) for row in self.inside):
            raise ValueError("inside must have one row a step and one share a layer")
        return self


class Record(_Part):
    """One run of one method. ``reason``: why ``status`` is not "ok"; of a good run, what a reader must know about it.

    ``label``: what the experiment calls this method with these options; rows of tables are named so. ``model_fingerprint``,
    ``dataset_fingerprint``: of what lay at a path, whose last part alone is the name (null for hub ids, for what is embedded,
    and in older records). ``max_grad_norm``: what was asked for; ``options`` has what was done. ``taken_from``: the run of
    another experiment that did this very work. ``evaluated_rows``: of the held-out rows those that have an answer within
    ``seq_len`` tokens (null in older records).
    """

    record_version: Literal[1] = 1
    experiment: str
    run: str
    method: str
    label: str | None = None
    options: dict[str, Any] = {}
    model: str
    model_fingerprint: str | None = None
    dataset: str
    dataset_fingerprint: str | None = None
    dtype: str
    lr: float
    seed: int
    batch_size: int
    seq_len: int
    steps: int
    schedule: str
    warmup_steps: int
    max_grad_norm: float | None = None
    held_out_from_last: int | None = None
    held_out_rows: int | None = None
    full_rows: bool | None = None
    status: Status
    reason: str | None = None
    curve: Curve = Curve()
    held_out: list[HeldOut] = []
    evaluated_rows: int | None = None
    held_out_tokens: int | None = None
    tokens_per_second: Spread | None = None
    samples_per_second: Spread | None = None
    step_seconds: list[float] = []
    memory: Memory | None = None
    energy: Energy | None = None
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    command: str | None = None
    date: str | None = None
    taken_from: str | None = None

    @property
    def name(self) -> str:
        """What a table calls this run's method."""
        return self.label or self.method

    @property
    def final_held_out_loss(self) -> float | None:
        """The held-out loss after the last step; None where training did not get there."""
        last = self.held_out[-1] if self.held_out else None
        return last.loss if last is not None and last.step == self.steps else None


def write_record(directory: Path, record: Record) -> Path:
    """Write ``directory/RUN.json`` at once (readers see it whole or not at all) and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{record.run}.json"
    write_json(path, record.model_dump(mode="json"))
    return path


def read_record(path: Path) -> Record:
    """Read one record. Raises GradLiteError for a file that is missing, is not JSON, or is no record."""
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GradLiteError(f"the record {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise GradLiteError(f"the record {path} is not UTF-8 text; delete it, and its run is done anew.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        what = in_words(problem, f"its key {place!r}") if place else problem["msg"]
        raise GradLiteError(f"{path} is no whole record ({what}); delete it, and its run is done anew.") from None
