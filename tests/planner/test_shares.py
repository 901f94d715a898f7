"""Shares: how many sites of a role take a format, against brute force, and how they are refused."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.errors import BudgetError, PlanError
from bitplan.options import PlanOptions
from bitplan.planner.budgets import BUDGETS, Limit, share_limit
from bitplan.planner.plan import Plan
from bitplan.planner.problem import Problem, read_problem
from bitplan.planner.search import best
from bitplan.planner.shares import parse_share
from bitplan.planner.stage import make_plan

FORMATS = ("int4-g128", "int8-g128")


def problem(tables: Callable[..., Any], *shares: str, blocks: int = 4, **options: Any) -> Problem:
    made = tables(blocks, seed=options.pop("seed", 0))
    return read_problem(
        made.profile, made.errors, made.sensitivity, formats=FORMATS, shares=shares, **options
    )


def count(plan: Plan, role: str, operand: str, name: str = "int8-g128") -> tuple[int, int]:
    mine = [c for c in plan.sites if c.role == role and c.operand == operand]
    return sum(str(c.format) == name for c in mine), len(mine)


def limit(value: float) -> Limit:
    return Limit(budget=BUDGETS["input_bits"], value=value)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    least=st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]),
    most=st.sampled_from([0.0, 0.5, 1.0]),
    bits=st.floats(4.2, 8.0),
)
def test_equals_brute_force(
    tables: Callable[..., Any], seed: int, least: float, most: float, bits: float
) -> None:
    """Inputs of three blocks, weights at 4 bits: every way to raise q/k/v and down_proj inputs."""
    keep = ("q_proj", "k_proj", "down_proj")
    made = tables(3, keep=keep, extra=False, seed=seed)
    shares = (f"fc2:input=int8-*>={least}", f"qkv:input=int8-g128<={most}")
    made_problem = read_problem(
        made.profile, made.errors, made.sensitivity, formats=FORMATS, shares=shares
    )
    loss = {(s, f): v for s, f, v in made.sensitivity.select("site", "format", "delta_loss").rows()}
    inputs = [r for r in made.profile.to_dicts() if r["operand"] == "input"]
    macs = {r["site"]: r["in_features"] * r["out_features"] for r in inputs}
    scale = {r["site"]: 16 * -(-r["in_features"] // 128) / r["in_features"] for r in inputs}
    weights = sum(v for (s, f), v in loss.items() if s.endswith("weight") and f == "int4-g128")
    groups = [[s for s in macs if f".{b}.{part}" in s] for b in range(3) for part in ("self", "ml")]
    values = []
    for mask in range(2 ** len(groups)):
        high = {s for k, group in enumerate(groups) if mask >> k & 1 for s in group}
        fc2, qkv = sum("down" in s for s in high) / 3, sum("_proj" in s for s in high)
        qkv = (qkv - 3 * fc2) / 6
        used = sum(m * ((8 if s in high else 4) + scale[s]) for s, m in macs.items())
        if fc2 >= least - 1e-9 and qkv <= most + 1e-9 and used <= bits * sum(macs.values()):
            values.append(sum(loss[s, FORMATS[s in high]] for s in macs) + weights)
    limits = [limit(bits), Limit(budget=BUDGETS["weight_bits"], value=4.51)]
    # Rows of 64 have one scale a row: 4.25 bits, and 4.2 for those of 160.
    if not values:
        with pytest.raises(BudgetError):
            best(made_problem, limits)
    else:
        assert best(made_problem, limits).value == pytest.approx(min(values), rel=1e-9)


@pytest.mark.parametrize("sign", ["<=", ">="])
def test_a_share_is_of_whole_sites(tables: Callable[..., Any], sign: str) -> None:
    for hundredths in range(101):
        made = problem(tables, f"fc2:input=int8-g128{sign}{hundredths / 100}", blocks=7)
        ((share, sites),) = made.shares.items()
        against = Fraction(hundredths, 100) if sign == "<=" else 1 - Fraction(hundredths, 100)
        whole = math.floor(against * len(sites))
        assert share_limit(made, share) == pytest.approx(whole / len(sites), abs=1e-12)


def test_a_plan_keeps_to_its_shares(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(4).write(tmp_path / "run")
    free = make_plan(run, PlanOptions(input_bits=5.0)).plan
    shares = ("fc1:input=int8-g128>=0.5", "fc2:input=int8-g128<=0.25")
    made = make_plan(run, PlanOptions(input_bits=6.0, shares=shares))
    assert count(made.plan, "fc1", "input")[0] >= 4
    assert count(made.plan, "fc2", "input")[0] <= 1
    assert made.plan.shares == shares
    assert "share fc1:input=int8-g128>=0.5" in " ".join(made.as_text().split())
    assert free.shares == ()
    every = make_plan(run, PlanOptions(input_bits=6.0, shares=("fc2:input=int8-g128>=1",))).plan
    forced = [c for c in every.sites if c.role == "fc2" and c.operand == "input"]
    assert {c.forced for c in forced} == {"share"}
    assert all("the shares leave no other format" in c.reason for c in forced)


def test_converge_keeps_to_shares(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(4).write(tmp_path / "run")
    made = make_plan(run, PlanOptions(converge=True, shares=("o:input=int8-g128>=1",))).plan
    assert count(made, "o", "input") == (4, 4)


def test_per_role_and_a_share_of_half_is_the_whole(tables: Callable[..., Any]) -> None:
    made = problem(tables, "fc2:input=int8-g128>=0.5", per_role=True)
    choice = best(made, [limit(6.0)]).choice
    taken = {
        f for s, f in zip(made.sites, choice, strict=True) if s.site.endswith("down_proj:input")
    }
    assert [str(made.formats[f]) for f in taken] == ["int8-g128"]


@pytest.mark.parametrize(
    ("share", "said"),
    [
        ("fc2:input=int8-g128", "write GLOB=FORMAT>=X"),
        ("fc2:input>=0.5", "write GLOB=FORMAT>=X"),
        ("fc2:input=int8-g128>=1.5", "no share from 0 to 1"),
        ("fc2:input=int8-g128<=half", "no share from 0 to 1"),
        ("fc3:input=int8-g128>=0.5", "matches no site: did you mean fc[12]:input"),
        ("fc2=int8-g128>=0.5", "end the glob in :input or :weight"),
        ("lm_head:weight=int8-g128>=0.5", "outside the plan"),
        ("fc2:input=int6-g128>=0.5", "they can take int4-g128, int8-g128"),
    ],
)
def test_refused(tables: Callable[..., Any], share: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        problem(tables, share)


def test_what_cannot_be_met_states_the_nearest(tables: Callable[..., Any]) -> None:
    pins = ("*.0.mlp.down_proj:input=int4-g128",)
    made = problem(tables, "fc2:input=int8-g128>=0.9", pins=pins)
    with pytest.raises(PlanError, match=r"the largest share that can is 0\.75"):
        best(made, [limit(6.0)])
    made = problem(tables, "fc2:input=int8-g128>=0.75", "fc2:input=int4-g128>=0.5")
    with pytest.raises(PlanError, match=r"int4-g128>=0\.5' cannot be met beside .*can is 0\.25"):
        best(made, [limit(6.0)])
    made = problem(tables, "*:input=int8-g128>=1")
    weights = Limit(budget=BUDGETS["weight_bits"], value=5.0)
    # The limit on weights is not in the way of the inputs, and not named.
    said = r"beside --share '\*:input=int8-g128>=1': the"
    with pytest.raises(BudgetError, match=said) as caught:
        best(made, [weights, limit(5.0)])
    smallest = float(str(caught.value).partition("can be met is ")[2].split()[0])
    assert np.isfinite(best(made, [weights, limit(smallest)]).value)


@given(value=st.floats(0, 1), is_most=st.booleans())
def test_parse_and_print_are_inverse(value: float, is_most: bool) -> None:
    text = f"fc2:input=int8-*{'<=' if is_most else '>='}{value:g}"
    assert str(parse_share(text)) == text
