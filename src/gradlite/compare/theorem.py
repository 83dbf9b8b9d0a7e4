"""The convergence theorem, tried on convex problems with a known optimum: ``E f(x̄_T) − f* ≤ O(1/√T) + a floor``.

The theorem says of SGD through a basis of rank R, with a step size ∝ 1/√T: the averaged iterate's suboptimality falls like
``T^{−1/2}`` to a floor that shrinks with R, and that vanishes with error feedback. Three experiments, each on least squares and
on logistic regression:

- ``slope``: suboptimality of the averaged iterate against T, step size ``c/√T``, spectrum over four decades. With a spectrum
  over one decade (``control``) SGD is faster than the theorem, because such a problem is strongly convex.
- ``floor``: suboptimality against the rank at one T and a larger step, where what is left is the floor.
- ``memory``: the same at one rank, by what is remembered of the residual and in what form.

Every point is a run of :class:`~gradlite.compare.theorem_sgd.SubspaceSGD` from zero and is saved as it comes; an interrupted
experiment continues with the points that are missing. The same settings give the same figures, up to rounding.
"""

import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import gradlite
from gradlite.compare.convex_problems import ConvexProblem, least_squares, logistic_regression
from gradlite.compare.terminal import print_table
from gradlite.compare.theorem_figure import draw_theorem
from gradlite.compare.theorem_sgd import SubspaceSGD, Variant
from gradlite.compare.theorem_tables import markdown_tables, rich_tables, summarise
from gradlite.train.files import check_writable, write_json, write_text

EXACT = Variant("exact SGD", basis=None)
STATIC = Variant("no feedback, static random basis", basis="random")
TRACKED = Variant("no feedback, tracked basis")
FEEDBACK = Variant("feedback, exact residual, full memory", memory="full")
SAMPLED = Variant("feedback, sampled residual, full memory", memory="full", residual="sampled")
SHRUNK = Variant("feedback, shrunk sample, full memory", memory="full", residual="shrunk")
FACTORED = tuple(
    Variant(f"feedback, {residual} residual, factored memory q = {text}", "gradient", "factored", residual, share)
    for residual in ("exact", "sampled")
    for text, share in (("r/4", 0.25), ("r/2", 0.5), ("r", 1.0))
)


@dataclass(frozen=True)
class Settings:
    """What is run. Step sizes are ``c/√T``; ``c`` differs by problem because its unit is weights squared over objective."""

    width: int = 64
    outputs: int = 16
    batch_size: int = 16
    least_squares_rows: int = 4096
    logistic_rows: int = 16384
    slope_steps: tuple[int, ...] = (64, 256, 1024, 4096)
    slope_rank: int = 8
    floor_steps: int = 2048
    floor_ranks: tuple[int, ...] = (2, 4, 8, 16, 32)
    memory_rank: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


DEFAULT_SETTINGS = Settings()

DIVERGED = 1e9
"""The weights' norm that ends a run: optima are below 100."""

_SUBOPTIMALITIES = ("suboptimality", "second_half_suboptimality", "last_iterate_suboptimality")
_STEP_SIZES = {
    "least squares": {"slope": 1.0, "control": 1.0, "floor": 3.0},
    "logistic regression": {"slope": 8.0, "control": 8.0, "floor": 24.0},
}
_DECADES = {"slope": 4.0, "control": 1.0, "floor": 1.5}
_LABEL_NOISE = {"slope": 1.0, "control": 1.0, "floor": 0.1}
_LOGISTIC_SCALE = {"slope": 0.5, "control": 0.5, "floor": 1.0}


@dataclass(frozen=True)
class Point:
    """One run. ``rank`` is null for exact SGD; ``instance`` names the data (the memory experiment uses the floor's)."""

    experiment: str
    problem: str
    instance: str
    variant: str
    rank: int | None
    steps: int
    lr: float
    seed: int


def run_theorem(output_dir: Path, console: Console | None = None, settings: Settings = DEFAULT_SETTINGS) -> Path:
    """Runs what is missing of ``output_dir/theorem.json``, writes theorem.md and theorem.png beside it; returns its path.

    About 14 minutes on one thread. ``console``: where progress and tables are shown; nothing is shown without one.
    """
    console = console or Console(quiet=True)
    check_writable(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "theorem.json"
    header = _header(settings)
    saved = _saved_points(path, header)
    variants = {variant.name: variant for variant in (EXACT, STATIC, TRACKED, FEEDBACK, SAMPLED, SHRUNK, *FACTORED)}
    points = list(_points(settings))
    results: list[dict[str, Any]] = []
    problems: dict[tuple[str, str], ConvexProblem] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small, and the order of sums must not depend on the machine
    try:
        with Progress(console=console, transient=True) as progress:
            for point in progress.track(points, description="theorem"):
                result = saved.get(_key(asdict(point)))
                if result is None:
                    key = (point.problem, point.instance)
                    if key not in problems:
                        problems[key] = _problem(*key, settings)
                    result = asdict(point) | run_point(problems[key], variants[point.variant], point, settings.batch_size)
                    write_json(path, {**header, "points": [*results, result, *_later(saved, points, len(results) + 1)]})
                results.append(result)
    finally:
        torch.set_num_threads(threads)
    record = {**header, **_provenance(), "summary": summarise(results), "points": results}
    write_json(path, record)
    write_text(output_dir / "theorem.md", markdown_tables(record))
    draw_theorem(record, output_dir / "theorem.png")
    for table in rich_tables(record):
        print_table(console, table)
    return path


def run_point(problem: ConvexProblem, variant: Variant, point: Point, batch_size: int) -> dict[str, float]:
    """One run: suboptimality of the average of all iterates (the theorem's), of their second half, and of the last one.

    Rows are drawn with replacement. All three are NaN where the run diverged.
    """
    rows, width = problem.optimum_MN.shape
    sgd = SubspaceSGD(rows, width, point.rank or width, variant, lr=point.lr, batch_size=batch_size, seed=point.seed)
    generator = torch.Generator().manual_seed(1_000_003 + point.seed)
    index_SB = torch.randint(len(problem.x_TN), (point.steps, batch_size), generator=generator)
    average_MN, half_MN = torch.zeros_like(sgd.weight_MN), torch.zeros_like(sgd.weight_MN)
    half = point.steps // 2
    began = time.perf_counter()
    reached = [math.nan] * len(_SUBOPTIMALITIES)
    # What a diverging run holds can overflow within one step, and the factored memory's eigenvectors then cannot be found.
    with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        for step, index_B in enumerate(index_SB):
            x_BN = problem.x_TN[index_B]
            left_BM = problem.output_gradient(x_BN @ sgd.weight_MN.T, problem.y_TM[index_B]) / batch_size
            sgd.step(left_BM, x_BN)
            if not float(sgd.weight_MN.norm()) < DIVERGED:
                break
            average_MN.lerp_(sgd.weight_MN, 1.0 / (step + 1))
            if step >= half:
                half_MN.lerp_(sgd.weight_MN, 1.0 / (step + 1 - half))
        else:
            reached = [problem.suboptimality(weight_MN) for weight_MN in (average_MN, half_MN, sgd.weight_MN)]
    return dict(zip(_SUBOPTIMALITIES, reached, strict=True)) | {"seconds": round(time.perf_counter() - began, 3)}


def _points(settings: Settings) -> Iterator[Point]:
    for problem, step_sizes in _STEP_SIZES.items():
        for seed in settings.seeds:
            for experiment, variants in (
                ("slope", (EXACT, STATIC, TRACKED, FEEDBACK, SAMPLED)),
                ("control", (EXACT, FEEDBACK)),
            ):
                for variant in variants:
                    rank = None if variant.basis is None else settings.slope_rank
                    for steps in settings.slope_steps:
                        lr = step_sizes[experiment] / math.sqrt(steps)
                        yield Point(experiment, problem, experiment, variant.name, rank, steps, lr, seed)
            steps = settings.floor_steps
            lr = step_sizes["floor"] / math.sqrt(steps)
            yield Point("floor", problem, "floor", EXACT.name, None, steps, lr, seed)
            for rank in settings.floor_ranks:
                for variant in (STATIC, TRACKED, FEEDBACK):
                    yield Point("floor", problem, "floor", variant.name, rank, steps, lr, seed)
            for variant in (STATIC, TRACKED, FEEDBACK, SAMPLED, SHRUNK, *FACTORED):
                yield Point("memory", problem, "floor", variant.name, settings.memory_rank, steps, lr, seed)


def _problem(name: str, instance: str, settings: Settings) -> ConvexProblem:
    sizes = {"seed": 0, "width": settings.width, "outputs": settings.outputs}
    decades = _DECADES[instance]
    if name == "least squares":
        rows = settings.least_squares_rows
        return least_squares(**sizes, rows=rows, decades=decades, noise=_LABEL_NOISE[instance])
    return logistic_regression(**sizes, rows=settings.logistic_rows, decades=decades, scale=_LOGISTIC_SCALE[instance])


def _header(settings: Settings) -> dict[str, Any]:
    """What the points depend on. A file with another header is from other settings, and is not continued."""
    return {
        "record_version": 1,
        "experiment": "theorem",
        "versions": {"gradlite": gradlite.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "settings": asdict(settings),
        "instances": {
            "step_size_c": _STEP_SIZES,
            "spectrum_decades": _DECADES,
            "least_squares_label_noise": _LABEL_NOISE,
            "logistic_scale": _LOGISTIC_SCALE,
        },
        "variants": [v.describe() for v in (EXACT, STATIC, TRACKED, FEEDBACK, SAMPLED, SHRUNK, *FACTORED)],
    }


def _saved_points(path: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The points of a file with the same header, by what was run; none if it is absent, broken or of other settings."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = json.loads(json.dumps(header))
    if not isinstance(record, dict) or any(record.get(key) != value for key, value in same.items()):
        return {}
    try:
        return {_key(result): result for result in record["points"]}
    except (KeyError, TypeError):
        return {}


def _key(result: dict[str, Any]) -> str:
    return json.dumps({name: result[name] for name in Point.__dataclass_fields__})


def _later(saved: dict[str, dict[str, Any]], points: list[Point], start: int) -> list[dict[str, Any]]:
    """Saved points after the one that was just run: they must not be lost if this run is interrupted as well."""
    keys = (_key(asdict(point)) for point in points[start:])
    return [saved[key] for key in keys if key in saved]


def _provenance() -> dict[str, Any]:
    return {
        "machine": {"processor": platform.machine(), "threads": 1, "cuda": False},
        "command": "gradlite compare --preset theorem",
        "date": time.strftime("%Y-%m-%d"),
    }
