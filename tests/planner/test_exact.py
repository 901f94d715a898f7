"""Plans against an enumeration of every assignment, priced by loops that share no code with it."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.errors import BudgetError
from bitplan.formats import Format, parse_format
from bitplan.planner.budgets import BUDGETS, Limit
from bitplan.planner.devices import DEVICES
from bitplan.planner.problem import Problem, read_problem
from bitplan.planner.search import best

Assignment = dict[str, Format]
H200 = {16: 989.4e12, 8: 1978.9e12, 4: 1978.9e12}


def effective_bits(fmt: Format, length: int) -> float:
    """Count the scales of one row one by one."""
    if fmt.name == "bf16":
        return 16.0
    scales = 0
    for index in range(length):
        scales += index % (fmt.group_size or length) == 0
    return (fmt.bits * length + fmt.scale_bits * scales) / length


def naive(rows: list[dict[str, Any]], plan: Assignment, name: str) -> float:
    """Price an assignment by the definition of a budget."""
    tokens = max(row["tokens"] or 0 for row in rows)
    inputs = {row["module"]: row for row in rows if row["operand"] == "input"}
    total, size = 0.0, 0.0
    for row in rows:
        if row["role"] not in ("qkv", "o", "fc1", "fc2"):
            continue
        elements = row["in_features"] * row["out_features"]
        macs = elements * inputs[row["module"]]["tokens"] / tokens
        weight = plan[row["module"] + ":weight"]
        input_ = plan[row["module"] + ":input"]
        if row["operand"] == "weight":
            if name == "weight_bits":
                total += elements * effective_bits(weight, row["in_features"])
                size += elements
            if name == "bytes":
                total += elements * effective_bits(weight, row["in_features"]) / 8
            if name == "bit_ops":
                total += macs * weight.bits * input_.bits
            if name == "time":
                total += 2 * macs * 4096 / H200[max(weight.bits, input_.bits)] * 1e3
        elif name == "input_bits":
            total += macs * effective_bits(input_, row["in_features"])
            size += macs
    return total / size if size else total


def losses(sensitivity: pl.DataFrame) -> dict[tuple[str, str], float]:
    """Take the largest of a measurement, those of finer formats, and zero."""
    raw = {(s, f): v for s, f, v in sensitivity.select("site", "format", "delta_loss").iter_rows()}
    out = {}
    for site, name in raw:
        fmt = parse_format(name)
        out[site, name] = max(
            0.0,
            *(v for (s, f), v in raw.items() if s == site and f == name),
            *(v for (s, f), v in raw.items() if s == site and parse_format(f).bits > fmt.bits),
        )
    return out


def assignments(
    rows: list[dict[str, Any]], formats: tuple[str, ...], pins: Assignment, *, per_role: bool
) -> Iterator[Assignment]:
    """Yield every assignment that keeps fused groups (or roles) together and pins in place."""
    decisions: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["site"] not in pins and row["role"] in ("qkv", "o", "fc1", "fc2"):
            name = row["role"] if per_role else row["fused"] or row["module"]
            decisions.setdefault((name, row["operand"]), []).append(row["site"])
    choices = [[parse_format(f) for f in formats]] * len(decisions)
    for combination in itertools.product(*choices):
        plan = dict(pins)
        for sites, fmt in zip(decisions.values(), combination, strict=True):
            plan.update(dict.fromkeys(sites, fmt))
        yield plan


def limits_between(
    rows: list[dict[str, Any]], plans: list[Assignment], shares: dict[str, float]
) -> dict[str, float]:
    """Return a limit of each named budget, at a share of the way from its least to its most."""
    out = {}
    for name, share in shares.items():
        costs = [naive(rows, plan, name) for plan in plans]
        out[name] = min(costs) + share * (max(costs) - min(costs))
    return out


def as_limits(values: dict[str, float]) -> list[Limit]:
    device = DEVICES["h200"]
    return [
        Limit(budget=BUDGETS[name], value=value, device=device if name == "time" else None)
        for name, value in values.items()
    ]


def chosen(problem: Problem, choice: np.ndarray) -> Assignment:
    return {s.site: problem.formats[f] for s, f in zip(problem.sites, choice, strict=True)}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_brute_force(tables: Callable[..., Any], data: st.DataObject) -> None:
    formats = data.draw(
        st.sampled_from([("int4-g128", "int8-g128"), ("int4-g32", "int8-g32", "bf16")])
    )
    keep = data.draw(
        st.sampled_from(
            [("q_proj", "k_proj", "down_proj"), ("gate_proj", "up_proj", "o_proj"), ("down_proj",)]
        )
    )
    per_role = data.draw(st.booleans())
    blocks = data.draw(st.integers(1, 2)) if len(formats) == 2 or keep == ("down_proj",) else 1
    made = tables(blocks, keep=keep, formats=formats[:2], seed=data.draw(st.integers(0, 999)))
    noise = np.random.default_rng(data.draw(st.integers(0, 999))).normal(
        0, 10.0 ** data.draw(st.integers(-6, -3)), len(made.sensitivity)
    )
    sensitivity = made.sensitivity.with_columns(pl.col("delta_loss") + pl.Series(noise))
    pins, pinned = (), {}
    if data.draw(st.booleans()):
        module = f"model.layers.0.{'self_attn' if 'o_proj' in keep else 'mlp'}"
        site = f"{module}.{'o_proj' if 'o_proj' in keep else 'down_proj'}:input"
        pins, pinned = (f"{site}=int8-g128",), {site: parse_format("int8-g128")}
        if formats[1] != "int8-g128":
            pins, pinned = (f"{site}={formats[1]}",), {site: parse_format(formats[1])}
    problem = read_problem(
        made.profile, made.errors, sensitivity, formats=formats, pins=pins, per_role=per_role
    )
    rows = made.profile.to_dicts()
    plans = list(assignments(rows, formats, pinned, per_role=per_role))
    names = data.draw(st.lists(st.sampled_from(sorted(BUDGETS)), max_size=3, unique=True))
    shares = {name: data.draw(st.floats(0.0, 1.0)) for name in names}
    values = limits_between(rows, plans, shares)

    loss = losses(sensitivity)
    feasible = [
        sum(loss.get((site, str(fmt)), 0.0) for site, fmt in plan.items())
        for plan in plans
        if all(naive(rows, plan, n) <= v * (1 + 1e-9) for n, v in values.items())
    ]
    if not feasible:
        with pytest.raises(BudgetError):
            best(problem, as_limits(values))
        return
    found = best(problem, as_limits(values))
    mine = chosen(problem, found.choice)
    assert {s: f for s, f in mine.items() if s in plans[0]} in plans
    assert all(naive(rows, mine, n) <= v * (1 + 1e-8) for n, v in values.items())
    assert found.value == pytest.approx(min(feasible), rel=1e-9, abs=1e-15)
    assert found.gap == 0.0


def test_a_pinned_input_counts_where_weights_have_a_budget_too(tables: Callable[..., Any]) -> None:
    formats = ("int4-g32", "int8-g32", "bf16")
    made = tables(1, keep=("q_proj", "k_proj", "down_proj"), formats=formats[:2])
    pins = ("model.layers.0.mlp.down_proj:input=int8-g32",)
    problem = read_problem(made.profile, made.errors, made.sensitivity, formats=formats, pins=pins)
    pinned = {pins[0].partition("=")[0]: parse_format("int8-g32")}
    rows = made.profile.to_dicts()
    plans = list(assignments(rows, formats, pinned, per_role=False))
    values = limits_between(rows, plans, {"bytes": 0.0, "input_bits": 0.0})
    mine = chosen(problem, best(problem, as_limits(values)).choice)
    assert naive(rows, mine, "input_bits") == pytest.approx(values["input_bits"])


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_budgets_are_counted_as_defined(tables: Callable[..., Any], name: str) -> None:
    # 200 is no multiple of the group: the last group is short and has a scale of its own.
    formats = ("int4-g128", "int8-g32", "nvfp4", "fp8-e4m3")
    routed = {"model.layers.0.mlp.down_proj": 130, "model.layers.0.self_attn.o_proj": 0}
    made = tables(1, formats=formats, tokens=routed)
    profile = made.profile.with_columns(
        pl.when(pl.col("role") == "fc2").then(200).otherwise("in_features").alias("in_features")
    )
    problem = read_problem(profile, made.errors, made.sensitivity, formats=formats)
    rows = profile.to_dicts()
    limit = as_limits({name: math.inf})[0]
    rng = np.random.default_rng(0)
    for _ in range(5):
        free = problem.fixed < 0
        choice = np.where(free, rng.integers(0, len(formats), len(free)), problem.fixed)
        expected = naive(rows, chosen(problem, choice), name)
        assert limit.cost(problem).total(problem, choice) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_an_infeasible_budget_reports_the_true_smallest(
    tables: Callable[..., Any], name: str
) -> None:
    made = tables(1, keep=("q_proj", "k_proj", "down_proj"))
    pins = ("fc2:input=int8-g128",)
    problem = read_problem(
        made.profile, made.errors, made.sensitivity, formats=("int4-g128", "int8-g128"), pins=pins
    )
    rows = made.profile.to_dicts()
    fc2 = [row["site"] for row in rows if row["site"].endswith("down_proj:input")]
    pinned = dict.fromkeys(fc2, parse_format("int8-g128"))
    plans = list(assignments(rows, ("int4-g128", "int8-g128"), pinned, per_role=False))
    smallest = min(naive(rows, plan, name) for plan in plans)
    with pytest.raises(BudgetError) as caught:
        best(problem, as_limits({name: smallest * 0.9}))
    assert caught.value.smallest == pytest.approx(smallest, rel=1e-12)
    # What the message says can be typed and works.
    said = float(str(caught.value).partition("can be met is ")[2].split()[0])
    assert best(problem, as_limits({name: said})).value >= 0


def test_budgets_that_clash_report_the_smallest_beside_the_others(
    tables: Callable[..., Any],
) -> None:
    # A100 has a rate for int4 and none for fp4; MXFP4 is the shorter one: bits and time disagree.
    formats = ("int4-g16", "mxfp4")
    made = tables(1, keep=("down_proj",), formats=formats, extra=False)
    problem = read_problem(made.profile, made.errors, made.sensitivity, formats=formats)
    macs = 160 * 64
    int4_ms = 2 * macs * 4096 / 1248e12 * 1e3
    fast = Limit(budget=BUDGETS["time"], value=int4_ms, device=DEVICES["a100"])
    short = Limit(budget=BUDGETS["input_bits"], value=4.3)
    assert chosen(problem, best(problem, [fast]).choice).keys()
    assert chosen(problem, best(problem, [short]).choice).keys()
    with pytest.raises(BudgetError, match="beside input_bits") as caught:
        best(problem, [short, fast])
    # With MXFP4 inputs the product runs at the bf16 rate, whatever the weights are.
    assert caught.value.smallest == pytest.approx(2 * macs * 4096 / 312e12 * 1e3)


def test_several_infeasible_budgets_report_values_that_hold_together(
    tables: Callable[..., Any],
) -> None:
    formats = ("int4-g128", "int8-g128")
    made = tables(1, keep=("q_proj", "k_proj", "down_proj"))
    problem = read_problem(made.profile, made.errors, made.sensitivity, formats=formats)
    asked = {"input_bits": 4.0, "bytes": 10.0, "bit_ops": 1e9}
    with pytest.raises(
        BudgetError, match="no plan meets input_bits <= 4 and bytes <= 10"
    ) as caught:
        best(problem, as_limits(asked))
    said = str(caught.value).partition("together is ")[2].partition(";")[0]
    nearest = {name: float(value) for name, _, value in map(str.split, said.split(" and "))}
    assert set(nearest) == {"input_bits", "bytes"}
    assert best(problem, as_limits({**asked, **nearest})).value >= 0
