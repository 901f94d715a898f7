"""What training leaves of a predicted loss: the curve, the file, and plans that near R = 1."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.errors import PlanError
from bitplan.options import PlanOptions
from bitplan.planner.explain import explain_sites
from bitplan.planner.plan import Plan
from bitplan.planner.stage import make_plan
from bitplan.planner.trained import Curve
from bitplan.rundir import RunDir
from bitplan.tables import TRAINED

loss = st.floats(1e-6, 10.0)


@given(st.lists(st.tuples(loss, loss), min_size=1, max_size=6), loss)
def test_the_curve_goes_through_its_points_and_back(
    points: list[tuple[float, float]], value: float
) -> None:
    predicted, trained = np.sort(np.array(points), axis=0).T
    curve = Curve(predicted=predicted, trained=trained)
    # Equal predictions have no single loss after training; the others are met exactly.
    alone = np.unique(predicted, return_counts=True)[1].max() == 1
    if alone:
        for p, t in zip(predicted, trained, strict=True):
            assert curve.after(p) == pytest.approx(t, rel=1e-9)
    if alone and np.unique(trained).size == trained.size:
        assert curve.before(curve.after(value)) == pytest.approx(value, rel=1e-6)
    assert curve.after(2 * value) >= curve.after(value) * (1 - 1e-12)


def test_one_point_is_a_factor_and_two_are_a_power() -> None:
    one = Curve(predicted=np.array([0.2]), trained=np.array([0.1]))
    assert one.after(0.5) == pytest.approx(0.25)
    two = Curve(predicted=np.array([0.01, 0.16]), trained=np.array([0.01, 0.04]))
    assert two.after(0.04) == pytest.approx(0.02)  # the square root of both sides, tenths apart
    assert two.before(0.02) == pytest.approx(0.04)
    assert two.after(0.32) == pytest.approx(0.08)


def train(
    run: Path, plan: Plan, after: Callable[[str, float], float], recipe: str = "r"
) -> dict[str, float]:
    """Append what `verify` would find if training left `after(operand, predicted)`."""
    directory = RunDir.open(run)
    deltas, rows = {}, []
    for operand in ("weight", "input"):
        chosen = [s for s in plan.sites if s.operand == operand and s.planned]
        predicted = sum(s.delta_loss or 0.0 for s in chosen)
        deltas[operand] = after(operand, predicted)
        rows.append(
            {
                "recipe": recipe,
                "operand": operand,
                "formats": json.dumps({s.site: str(s.format) for s in chosen}),
                "delta": deltas[operand],
                "low": 0.0,
                "high": 1.0,
                "seeds": 3,
                "tokens": 1000,
            }
        )
    frames = [TRAINED.frame(rows)]
    if (run / TRAINED.file).is_file():
        frames.insert(0, directory.read_table(TRAINED.file))
    with directory.lock():
        directory.write_table(TRAINED.file, pl.concat(frames))
    return deltas


def repaired(operand: str, predicted: float) -> float:
    """A training that repairs nine tenths of the weights' loss and less of larger input losses."""
    return 0.1 * predicted if operand == "weight" else 0.5 * predicted**0.9


def test_planning_and_training_in_turn_brings_r_to_one(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    made = tables(12)
    more = pl.when(pl.col("site").str.ends_with(":input")).then(3.0).otherwise(1.0)
    made.sensitivity = made.sensitivity.with_columns(pl.col("delta_loss") * more)
    run = made.write(tmp_path / "run")
    before = make_plan(run, PlanOptions(converge=True)).plan
    assert before.predicted.R is not None
    assert before.predicted.R_trained is None
    assert "before training" in " ".join(before.notes)
    train(run, make_plan(run, PlanOptions(rule="uniform")).plan, repaired)
    ratios = []
    for _ in range(4):
        plan = make_plan(run, PlanOptions(converge=True)).plan
        deltas = train(run, plan, repaired)
        ratios.append(deltas["input"] / deltas["weight"])
    assert before.predicted.R > 0.8
    assert 0.9 < ratios[-1] <= 1.02
    assert plan.predicted.R_trained == pytest.approx(ratios[-1], rel=0.02)
    assert plan.predicted.R is not None
    assert plan.predicted.R < 0.8
    assert "after training" in " ".join(plan.notes)
    assert Plan.from_json(plan.as_json()) == plan


def test_only_converge_reads_what_was_trained(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(3).write(tmp_path / "run")
    plain = make_plan(run, PlanOptions(input_bits=5.0))
    train(run, plain.plan, repaired)
    assert make_plan(run, PlanOptions(input_bits=5.0)).up_to_date
    converged = make_plan(run, PlanOptions(converge=True))
    assert make_plan(run, PlanOptions(converge=True)).up_to_date
    train(run, converged.plan, repaired)
    assert not make_plan(run, PlanOptions(converge=True)).up_to_date


def test_a_plan_that_was_found_to_converge_stands(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    run = tables(6).write(tmp_path / "run")
    train(run, make_plan(run, PlanOptions(rule="uniform")).plan, repaired)
    plan = make_plan(run, PlanOptions(converge=True)).plan
    verdict = run / "verdict.json"
    verdict.write_text(json.dumps({"verdict": "converged", "plan_id": plan.plan_id}))
    train(run, plan, repaired)
    assert make_plan(run, PlanOptions(converge=True)).up_to_date
    assert not make_plan(run, PlanOptions(converge=True, formats=("int4-g128",))).up_to_date
    make_plan(run, PlanOptions(converge=True))
    for found in (
        {"verdict": "undetermined", "plan_id": plan.plan_id},
        {"verdict": "converged", "plan_id": "another"},
    ):
        train(run, plan, lambda operand, p: repaired(operand, p) * 1.01)
        verdict.write_text(json.dumps(found))
        assert not make_plan(run, PlanOptions(converge=True)).up_to_date


def test_a_plan_can_be_explained_after_its_trainings(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    run = tables(3).write(tmp_path / "run")
    train(run, make_plan(run, PlanOptions(rule="uniform")).plan, repaired)
    plan = make_plan(run, PlanOptions(converge=True)).plan
    train(run, plan, lambda operand, p: 1.1 * repaired(operand, p))
    assert explain_sites(run, "fc2:input").plan == plan


def test_the_last_recipe_alone_counts(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(3).write(tmp_path / "run")
    uniform = make_plan(run, PlanOptions(rule="uniform")).plan
    train(run, uniform, lambda _, predicted: 100 * predicted, recipe="old")
    train(run, uniform, lambda _, predicted: 0.5 * predicted, recipe="new")
    p = make_plan(run, PlanOptions(converge=True)).plan.predicted
    assert p.R_trained == pytest.approx(p.R)


def test_trainings_of_another_checkpoint_are_refused(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    run = tables(3).write(tmp_path / "run")
    other = tables(4).write(tmp_path / "other")
    train(run, make_plan(other, PlanOptions(rule="uniform")).plan, repaired)
    with pytest.raises(PlanError, match="which this checkpoint lacks"):
        make_plan(run, PlanOptions(converge=True))


def test_trainings_that_cannot_be_priced_leave_the_checkpoints_own(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    run = tables(3).write(tmp_path / "run")
    plan = make_plan(run, PlanOptions(rule="uniform")).plan
    train(run, plan, lambda operand, _: -0.001 if operand == "weight" else 0.1)
    made = make_plan(run, PlanOptions(converge=True)).plan
    assert made.predicted.R_trained is None
    assert "before training" in " ".join(made.notes)
