"""The plan as a value: JSON both ways, its id, and its fit to a checkpoint."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitplan.errors import PlanError
from bitplan.formats import parse_format
from bitplan.options import PlanOptions
from bitplan.planner.plan import Plan, read_plan
from bitplan.planner.stage import make_plan
from bitplan.rundir import RunDir


@pytest.fixture
def plan(tables: Callable[..., Any], tmp_path: Path) -> Plan:
    return make_plan(tables(2).write(tmp_path / "run"), PlanOptions(input_bits=5.0)).plan


def test_json_round_trip(plan: Plan) -> None:
    text = json.dumps(plan.as_json(), allow_nan=False)
    again = Plan.from_json(json.loads(text))
    assert again == plan
    assert again.assignment == plan.assignment


def test_the_file_is_the_plan(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(2).write(tmp_path / "run")
    made = make_plan(run, PlanOptions()).plan
    assert read_plan(RunDir.open(run)) == made
    assert made.provenance["model"]["content_hash"] == "0" * 16


def test_the_id_is_of_the_formats_alone(plan: Plan) -> None:
    assert replace(plan, notes=("other",), made_by="rule x").plan_id == plan.plan_id
    first = replace(plan.sites[3], format=parse_format("int8-g32"))
    assert replace(plan, sites=(*plan.sites[:3], first, *plan.sites[4:])).plan_id != plan.plan_id


def test_a_plan_changed_by_hand_is_refused(plan: Plan) -> None:
    value = plan.as_json()
    value["sites"]["model.layers.0.mlp.down_proj:weight"]["format"] = "int8-g32"
    with pytest.raises(PlanError, match="plan_id"):
        Plan.from_json(value)


@pytest.mark.parametrize("damage", [{"sites": None}, {"predicted": {}}, {"schema": 99}, []])
def test_a_damaged_plan_is_refused(plan: Plan, damage: Any) -> None:
    value = {**plan.as_json(), **damage} if isinstance(damage, dict) else damage
    with pytest.raises(PlanError, match="plan again"):
        Plan.from_json(value)


def test_a_plan_from_before_shares_and_advice_is_read(plan: Plan) -> None:
    value = json.loads(json.dumps(plan.as_json()))
    del value["shares"], value["advice"]
    for entry in value["sites"].values():
        del entry["kurtosis_misleads"]
    assert Plan.from_json(value).assignment == plan.assignment


def test_check_sites_lists_what_is_missing(plan: Plan) -> None:
    sites = list(plan.assignment)
    plan.check_sites(sites)
    with pytest.raises(PlanError, match=r"checkpoint lacks model\.embed_tokens:weight"):
        plan.check_sites(sites[1:])
    with pytest.raises(PlanError, match=r"plan lacks a:input, b:input, c:input and 1 more"):
        plan.check_sites([*sites, "a:input", "b:input", "c:input", "d:input"])
