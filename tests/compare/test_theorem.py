"""The theorem's problems have the optimum they claim, its algorithm is the package's own, and its runner keeps what it ran."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

import gradlite
from gradlite.compare import theorem
from gradlite.compare.convex_problems import ConvexProblem, least_squares, logistic_regression
from gradlite.compare.theorem import (
    EXACT,
    FACTORED,
    FEEDBACK,
    SAMPLED,
    STATIC,
    TRACKED,
    Point,
    Settings,
    run_point,
    run_theorem,
)
from gradlite.compare.theorem_sgd import SubspaceSGD, Variant
from gradlite.compare.theorem_tables import fit_slope, summarise, tables
from gradlite.optim.adam import subspace_scale

SIZES = {"seed": 3, "width": 16, "outputs": 8}


def small_least_squares() -> ConvexProblem:
    return least_squares(**SIZES, rows=256, decades=1.5, noise=0.1)


def small_logistic() -> ConvexProblem:
    return logistic_regression(**SIZES, rows=512, decades=1.0, scale=0.5)


@pytest.mark.parametrize("make", [small_least_squares, small_logistic])
def test_optimum(make: Callable[[], ConvexProblem]) -> None:
    problem = make()
    assert float(problem.gradient(problem.optimum_MN).norm()) < 1e-11
    generator = torch.Generator().manual_seed(0)
    weight_MN = problem.optimum_MN.clone().requires_grad_()
    elsewhere_MN = problem.optimum_MN + 0.01 * torch.randn(weight_MN.shape, generator=generator, dtype=torch.float64)
    assert problem.suboptimality(elsewhere_MN) > 1e-6
    # The closed gradient is that of the loss.
    outputs_TM = problem.x_TN @ elsewhere_MN.requires_grad_().T
    problem.loss(outputs_TM, problem.y_TM).mean().backward()
    assert elsewhere_MN.grad is not None
    torch.testing.assert_close(problem.gradient(elsewhere_MN.detach()), elsewhere_MN.grad)


def test_separable_labels_are_refused() -> None:
    with pytest.raises(gradlite.GradLiteError, match="no minimum"):
        logistic_regression(seed=0, rows=16, width=16, outputs=1, decades=0.0, scale=5.0)


def batches_of(problem: ConvexProblem, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    index_SB = torch.randint(len(problem.x_TN), (count, 8), generator=generator)
    return [(problem.x_TN[index_B], problem.y_TM[index_B]) for index_B in index_SB]


@pytest.mark.parametrize("variant", [STATIC, TRACKED, Variant("", memory="full", residual="shrunk"),
                                     Variant("", memory="factored", residual="shrunk")])  # fmt: skip
def test_is_the_packages_optimizer_where_adam_is_sgd(variant: Variant) -> None:
    """With a huge ε and β₁ = 0 Adam's direction is the gradient over ε: the package's step must be SubspaceSGD's."""
    problem, rank, lr, eps = small_least_squares(), 8, 0.05, 1e6
    layer = nn.Linear(16, 16, bias=False, dtype=torch.float64)  # fewer than 16 rows would not be projected
    nn.init.zeros_(layer.weight)
    optimizer = gradlite.GradLite(
        layer,
        lr=lr * eps / subspace_scale(16, rank),
        rank=rank,
        eps=eps,
        betas=(0.0, 0.999),
        moments="fp32",
        feedback="feedback" if variant.memory else "off",
        feedback_memory="fp32" if variant.memory == "full" else "factored",
        basis=variant.basis or "gradient",
        seed=5,
    )
    sgd = SubspaceSGD(16, 16, rank, variant, lr=lr, batch_size=8, seed=5)
    for x_BN, y_BM in batches_of(problem, 23):
        targets_BM = torch.cat((y_BM, 2 * y_BM.flip(1)), 1)
        outputs_BM = layer(x_BN)
        (0.5 * (outputs_BM - targets_BM).square().sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        sgd.step((x_BN @ sgd.weight_MN.T - targets_BM) / len(x_BN), x_BN)
    assert float(sgd.weight_MN.norm()) > 1.0
    torch.testing.assert_close(layer.weight.detach(), sgd.weight_MN, rtol=1e-4, atol=1e-5)


def test_full_rank_is_exact_sgd() -> None:
    problem = small_least_squares()
    exact = SubspaceSGD(8, 16, 16, EXACT, lr=0.1, batch_size=8, seed=0)
    turned = SubspaceSGD(8, 16, 16, FEEDBACK, lr=0.1, batch_size=8, seed=0)
    for x_BN, y_BM in batches_of(problem, 20):
        for sgd in (exact, turned):
            sgd.step((x_BN @ sgd.weight_MN.T - y_BM) / 8, x_BN)
    torch.testing.assert_close(turned.weight_MN, exact.weight_MN)


def suboptimality(problem: ConvexProblem, variant: Variant, rank: int, steps: int = 800) -> float:
    point = Point("floor", problem.name, "floor", variant.name, rank, steps, 0.1, 0)
    return run_point(problem, variant, point, 8)["suboptimality"]


def test_floor_falls_with_rank_and_vanishes_with_feedback() -> None:
    problem = small_least_squares()
    static = [suboptimality(problem, STATIC, rank) for rank in (2, 4, 8)]
    tracked = [suboptimality(problem, TRACKED, rank) for rank in (2, 4, 8)]
    assert static[0] > static[1] > static[2]
    assert tracked[0] > tracked[1] > tracked[2]
    assert all(a > b for a, b in zip(static, tracked, strict=True))
    exact, feedback = suboptimality(problem, EXACT, 16), suboptimality(problem, FEEDBACK, 4)
    assert feedback < 1.2 * exact
    assert feedback < 0.2 * tracked[1]
    assert suboptimality(problem, SAMPLED, 4) < 0.5 * tracked[1]
    by_memory = [suboptimality(problem, variant, 4) for variant in FACTORED[:3]]
    assert tracked[1] > by_memory[0] > by_memory[1] > by_memory[2] > feedback


def test_static_basis_stays_on_its_floor() -> None:
    """Its floor is known: the least value of the objective over weights ``C Pᵀ``."""
    problem = small_least_squares()
    sgd = SubspaceSGD(8, 16, 4, STATIC, lr=0.1, batch_size=8, seed=0)
    for x_BN, y_BM in batches_of(problem, 600):
        sgd.step((x_BN @ sgd.weight_MN.T - y_BM) / 8, x_BN)
    basis_NR = sgd._collector.basis.matrix_NR
    assert basis_NR is not None
    best_RM = torch.linalg.lstsq(problem.x_TN @ basis_NR, problem.y_TM).solution
    floor = problem.suboptimality((basis_NR @ best_RM).T)
    assert floor <= problem.suboptimality(sgd.weight_MN) < 1.2 * floor


def test_fit_slope() -> None:
    slope, error = fit_slope([1, 10, 100], [5.0, 0.5, 0.05])
    assert slope == pytest.approx(-1.0)
    assert error == pytest.approx(0.0, abs=1e-12)
    # Two seeds a factor e apart at either end: four residuals of ±½, so σ² = 1/(4 − 2); the spread of log T is (ln 10)².
    slope, error = fit_slope([1, 1, 10, 10], [1.0, math.e, 1.0, math.e])
    assert slope == pytest.approx(0.0, abs=1e-12)
    assert error == pytest.approx(math.sqrt(0.5) / math.log(10))


def test_a_diverged_run_counts_as_infinite() -> None:
    base = {"experiment": "floor", "problem": "p", "rank": 2, "steps": 8, "second_half_suboptimality": 1.0}
    points = [
        {**base, "variant": TRACKED.name, "suboptimality": 10.0},
        *({**base, "variant": FEEDBACK.name, "suboptimality": value} for value in (0.5, 2.0, math.nan)),
    ]
    summary = summarise(points)
    floor = summary["floors"][1]
    assert (floor["median"], floor["min"], floor["max"]) == (2.0, 0.5, math.inf)
    assert summary["ratios"] == [{"problem": "p", "rank": 2, "times_lower": 5.0}]


@pytest.mark.parametrize(("variant", "lr"), [(EXACT, 50.0), (FACTORED[0], 50.0), (FACTORED[0], 1e60)])
def test_divergence_is_noticed(variant: Variant, lr: float) -> None:
    problem = small_least_squares()
    point = Point("floor", problem.name, "floor", variant.name, 4, 400, lr, 0)
    reached = run_point(problem, variant, point, 8)
    assert all(math.isnan(value) for name, value in reached.items() if name != "seconds")


TINY = Settings(
    width=16,
    outputs=2,
    batch_size=8,
    least_squares_rows=128,
    logistic_rows=1024,
    slope_steps=(8, 32),
    slope_rank=4,
    floor_steps=16,
    floor_ranks=(2, 4),
    memory_rank=4,
    seeds=(0,),
)


def test_run_is_recorded_drawn_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_theorem(tmp_path, settings=TINY)
    assert capsys.readouterr().out == ""
    record = json.loads(path.read_text())
    assert path == tmp_path / "theorem.json"
    assert imread(tmp_path / "theorem.png").std() > 0.01  # something is on it
    assert all(key in record for key in ("versions", "machine", "command", "date", "summary"))
    # 2 problems × (2 lengths × 7 + exact SGD + 2 ranks × 3 + 11 memories)
    assert len(record["points"]) == 2 * (2 * 7 + 1 + 2 * 3 + 11)
    titles = [title for title, _, _ in tables(record)]
    page = (tmp_path / "theorem.md").read_text()
    assert all(f"## {title}" in page for title in titles)
    _, head, rows = tables(record)[1]
    assert head == ["problem", "algorithm", "2", "4"]
    assert len(rows) == 2 * (4 + 1)
    # An interrupted experiment: two points are missing, one in the middle. They alone are run, and come out as before.
    lost = [record["points"][5], record["points"][-1]]
    record["points"] = [point for point in record["points"] if point not in lost]
    path.write_text(json.dumps(record))
    ran: list[Point] = []
    saved: list[int] = []

    def spy(problem: ConvexProblem, variant: Variant, point: Point, batch_size: int) -> dict[str, float]:
        ran.append(point)
        saved.append(len(json.loads(path.read_text())["points"]))
        return run_point(problem, variant, point, batch_size)

    monkeypatch.setattr(theorem, "run_point", spy)
    again = json.loads(run_theorem(tmp_path, settings=TINY).read_text())
    assert len(ran) == 2
    # What was saved further on is not lost while the file is written anew.
    assert saved == [len(record["points"]), len(record["points"]) + 1]
    assert again["points"][5]["suboptimality"] == pytest.approx(lost[0]["suboptimality"])
    assert again["points"][-1]["suboptimality"] == pytest.approx(lost[1]["suboptimality"])
    # Other settings are another experiment.
    ran.clear()
    run_theorem(tmp_path, settings=dataclasses.replace(TINY, floor_steps=17, seeds=(1,)))
    assert len(ran) == len(again["points"])
