"""An experiment: which methods do which work. One default file, small files that override it, flags that override both.

Importing this module is light: no torch, no transformers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gradlite.errors import GradLiteError
from gradlite.methods import unknown
from gradlite.train.yaml_file import read_mapping
from gradlite.validation import in_words, nearest, sentence

_FOLDER = Path(str(files("gradlite.compare") / "experiments"))

PRESETS: Mapping[str, Mapping[int, str]] = {
    "paper-small": {1: "paper-small-memory", 2: "paper-small-quality", 3: "paper-small-ablation"},
}
"""The experiments of each preset, by the number of the table that they make."""

_FLAGS = {"learning_rates": "--lr"}
"""Keys whose flag has another name."""

Kind = Literal["memory", "quality", "ablation"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _once_each(numbers: list[Any], shown: Callable[[Any], str]) -> list[Any]:
    names = [shown(number) for number in numbers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice")
    return numbers


def _rates_once_each(rates: list[float] | None) -> list[float] | None:
    """Rates are told apart as the names of their runs show them."""
    return None if rates is None else _once_each(rates, lambda rate: format(rate, "g"))


class MethodEntry(_Part):
    """One row of a table: a method, its options, and what the table calls them.

    ``learning_rates``: this row's sweep, where it is not its method's.
    """

    label: str = Field(min_length=1)
    method: str = Field(min_length=1)
    options: dict[str, Any] = {}
    learning_rates: list[Rate] | None = Field(None, min_length=1)

    @field_validator("label")
    @classmethod
    def _without_commas(cls, label: str) -> str:
        """They stand between the names in ``--methods``."""
        if "," in label:
            raise ValueError(f"{label!r} has a comma, and --methods could not name it")
        return label

    @field_validator("learning_rates")
    @classmethod
    def _distinct_rates(cls, rates: list[float] | None) -> list[float] | None:
        return _rates_once_each(rates)

    @property
    def slug(self) -> str:
        """The label as a part of a file's name."""
        words = self.label.lower().replace("³", "3").replace("+", " plus ").replace("/", " over ")
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


class Experiment(_Part):
    """Methods and the work that each of them does. docs: the comments in experiments/default.yaml."""

    name: str
    kind: Kind = "quality"
    title: str = ""
    model: str = Field(min_length=1)
    dataset: str = Field(min_length=1)
    held_out_from_last: int = Field(ge=0)
    held_out_rows: int = Field(ge=0)
    full_rows: bool
    dtype: Literal["bfloat16", "float32", "mixed"]
    batch_size: int = Field(ge=1)
    seq_len: int = Field(ge=2)
    steps: int = Field(ge=1)
    schedule: Literal["cosine", "linear", "constant"]
    warmup: float = Field(ge=0, lt=1)
    max_grad_norm: float = Field(ge=0)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(min_length=1)
    baselines: list[str]
    methods: list[MethodEntry] = Field(min_length=1)
    learning_rates: list[Rate] | None = Field(None, min_length=1)
    rates: dict[str, list[Rate]]

    @field_validator("name")
    @classmethod
    def _part_of_file_names(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"{name!r} cannot be a part of file names; give letters, digits, and (but not first) '.', '_' and '-'"
            )
        return name

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: list[int]) -> list[int]:
        """A number that is named twice would count twice in means and spreads."""
        return _once_each(seeds, str)

    @field_validator("learning_rates")
    @classmethod
    def _distinct_rates(cls, rates: list[float] | None) -> list[float] | None:
        return _rates_once_each(rates)

    @field_validator("rates")
    @classmethod
    def _of_methods(cls, rates: dict[str, list[Rate]]) -> dict[str, list[Rate]]:
        wrong = next((problem for problem in map(unknown, rates) if problem is not None), None)
        if wrong is not None:
            raise ValueError(wrong)
        for method, own in rates.items():
            try:
                _rates_once_each(own)
            except ValueError as error:
                raise ValueError(f"{method}: {error}") from None
        return rates

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.held_out_rows > self.held_out_from_last:
            raise ValueError(f"held_out_rows is {self.held_out_rows}, more than held_out_from_last ({self.held_out_from_last})")
        without = next((name for name in self.baselines if name not in {entry.label for entry in self.methods}), None)
        if without is not None:
            raise ValueError(f"baselines names {without!r}, but no method has that label")
        self._check_rows(self.methods)
        return self

    def _check_rows(self, rows: Sequence[MethodEntry]) -> None:
        """Raises ValueError for rows that this experiment cannot have beside each other."""
        slugs = [entry.slug for entry in rows]
        twice = next((entry.label for entry, slug in zip(rows, slugs, strict=True) if slugs.count(slug) > 1), None)
        if twice is not None:
            raise ValueError(f"two methods have the label {twice!r}, or ones that differ in signs only")
        for entry in rows:
            if len(self.rates_of(entry)) > 1 and not self.held_out_rows:
                raise ValueError(
                    "several learning rates need held_out_rows, to choose between them: give one rate (--lr), or held_out_rows"
                )

    def rates_of(self, entry: MethodEntry) -> list[float]:
        """The learning rates that the first seed runs."""
        wrong = unknown(entry.method)
        if wrong is not None:
            raise ValueError(wrong)
        found = entry.learning_rates or self.learning_rates or self.rates.get(entry.method)
        if not found:
            raise ValueError(f"there are no learning rates for method {entry.method!r}; give learning_rates")
        return found

    @property
    def weights_dtype(self) -> str:
        """Of the weights as they are loaded; the computation of ``mixed`` is in bfloat16."""
        return "float32" if self.dtype == "mixed" else self.dtype

    @property
    def warmup_steps(self) -> int:
        """Steps until the rate is at its peak."""
        return round(self.warmup * self.steps)

    def restricted_to(self, methods: Sequence[str], add_missing: Sequence[str] = ()) -> "Experiment | None":
        """The rows whose method or label is among ``methods``, and plain rows for ``add_missing``; None if none is left.

        Raises GradLiteError for a row that the experiment cannot have.
        """
        kept = [entry for entry in self.methods if entry.method in methods or entry.label in methods]
        added = [MethodEntry(label=name, method=name) for name in add_missing if self.kind != "ablation"]
        try:
            self._check_rows([*kept, *(entry for entry in added if unknown(entry.method) is None)])
        except ValueError as error:
            raise GradLiteError(sentence(f"--methods with the experiment {self.name!r}: {error}")) from None
        return self.model_copy(update={"methods": [*kept, *added]}) if kept or added else None


def load_experiment(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The default file, overridden by ``source`` (the name of a shipped experiment, or a YAML file), overridden by flags.

    Raises GradLiteError, in one sentence, for a file that cannot be read and for a key that is unknown or wrong.
    """
    path = source if isinstance(source, Path) else _FOLDER / f"{source}.yaml"
    own = read_mapping(path)
    known = list(Experiment.model_fields)
    for key in own:
        if key not in known:
            raise GradLiteError(f"unknown key {key!r} in {path}; {nearest(str(key), known)}")
    default = read_mapping(_FOLDER / "default.yaml")
    settings = {**default, "name": path.stem, **own, **(overrides or {})}
    rates = own.get("rates") or {}
    if not isinstance(rates, dict):
        raise GradLiteError(f"{path.name}: rates must be a mapping from methods to lists of learning rates.")
    settings["rates"] = {**default["rates"], **rates}
    if "learning_rates" in (overrides or {}) and isinstance(settings.get("methods"), list):
        # A row's own rates, too, give way to the flag.
        settings["methods"] = [
            {**entry, "learning_rates": None} if isinstance(entry, dict) else entry for entry in settings["methods"]
        ]
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if key in (overrides or {}):
        raise GradLiteError(sentence(in_words(problem, _FLAGS.get(key, "--" + key.replace("_", "-")))))
    clause = in_words(problem, _place(problem["loc"], settings), list(MethodEntry.model_fields))
    raise GradLiteError(sentence(f"{path.name}: {clause}"))


def _place(location: Sequence[str | int], settings: Mapping[str, Any]) -> str:
    """Where something stands in an experiment's file: rows by their labels, where they have one, as tables name them."""
    parts = list(map(str, location))
    rows = settings.get("methods")
    if len(location) > 1 and location[0] == "methods" and isinstance(rows, list):
        row = rows[int(location[1])]
        label = row.get("label") if isinstance(row, dict) else None
        parts[:2] = [f"methods, row {label!r}" if label else f"methods, row {int(location[1]) + 1}"]
        return ": ".join(filter(None, [parts[0], ".".join(parts[1:])]))
    return ".".join(parts)


def choose_experiments(
    preset: str, tables: Sequence[int] | None, methods: Sequence[str] | None, overrides: Mapping[str, Any]
) -> list[Experiment]:
    """The experiments of a preset, in the order of their tables, with only the rows of ``methods``.

    A method that no chosen table has is added, with its default options, to every table but the ablation.
    """
    if preset not in PRESETS:
        raise GradLiteError(f"there is no preset {preset!r}; known are {', '.join(PRESETS)} and theorem.")
    names = PRESETS[preset]
    unknown = sorted(set(tables or ()) - set(names))
    if unknown:
        raise GradLiteError(f"preset {preset!r} has no table {unknown[0]}; it has {', '.join(map(str, names))}.")
    chosen = [load_experiment(names[table], overrides) for table in sorted(set(tables or names))]
    return chosen if methods is None else restrict(chosen, methods)


def all_tables(preset: str, overrides: Mapping[str, Any]) -> list[Experiment]:
    """Every experiment of a preset with all of its rows, to show what is there: at whichever rates."""
    others = {key: value for key, value in overrides.items() if key != "learning_rates"}
    return [load_experiment(name, others) for name in PRESETS[preset].values()]


def restrict(experiments: Sequence[Experiment], methods: Sequence[str]) -> list[Experiment]:
    """Only the rows of ``methods``, and plain rows for those that no experiment has. Raises GradLiteError if none is left."""
    present = {word for one in experiments for entry in one.methods for word in (entry.method, entry.label)}
    missing = [name for name in methods if name not in present]
    kept = [experiment.restricted_to(methods, missing) for experiment in experiments]
    found = [experiment for experiment in kept if experiment is not None]
    if not found:
        raise GradLiteError(f"no chosen table has any of the methods {', '.join(methods)}.")
    return found
