"""Plans for a target against an enumeration of every assignment that its table allows."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitplan.errors import BudgetError, PlanError
from bitplan.formats import BF16, parse_format
from bitplan.options import PlanOptions
from bitplan.planner.budgets import BUDGETS, Limit, objective
from bitplan.planner.constrain import constrain
from bitplan.planner.converge import converge
from bitplan.planner.problem import UNFIXED, Problem, read_problem
from bitplan.planner.search import best
from bitplan.planner.stage import make_plan
from bitplan.planner.targets import TARGETS, Scheme, Target
from bitplan.sites import Linear, describe

FORMATS = ("int4-g32", "int8-g32", "int4-token", "int8-token")
WEIGHTS, INPUTS = FORMATS[:2], FORMATS
PAIRS = st.sets(
    st.tuples(st.sampled_from(WEIGHTS), st.sampled_from(INPUTS)), min_size=1, max_size=6
)


def toy(pairs: set[tuple[str, str]]) -> Target:
    return Target(
        name="toy",
        library="toy 1",
        schemes=tuple(Scheme(w, i) for w, i in sorted(pairs)),
        formats=FORMATS,
        checked="",
    )


def choices(problem: Problem, allowed: set[tuple[str, str]]) -> Iterator[np.ndarray]:
    """Yield every choice whose linears each have an allowed pair, fused ones the same."""
    names = [str(f) for f in problem.formats]
    groups = sorted(set(problem.group.tolist()))
    planned = [g for g in groups if problem.counted[problem.group[problem.linear] == g].any()]
    every = list(itertools.product(WEIGHTS, INPUTS))
    for combination in itertools.product(every, repeat=len(planned)):
        choice = np.where(problem.fixed == UNFIXED, 0, problem.fixed)
        for group, pair in zip(planned, combination, strict=True):
            for i in np.flatnonzero(problem.group[problem.linear] == group).tolist():
                if problem.fixed[i] == UNFIXED:
                    choice[i] = names.index(pair[bool(problem.is_input[i])])
        got = {
            (names[choice[w]], names[choice[i]])
            for w, i in zip(problem.site_of("weight"), problem.site_of("input"), strict=True)
            if problem.counted[w]
        }
        if got <= allowed:
            yield choice


@settings(max_examples=40, deadline=None)
@given(pairs=PAIRS, data=st.data())
def test_equals_brute_force(
    tables: Callable[..., Any], pairs: set[tuple[str, str]], data: st.DataObject
) -> None:
    keep = data.draw(st.sampled_from([("q_proj", "k_proj", "down_proj"), ("up_proj", "o_proj")]))
    made = tables(1, keep=keep, formats=FORMATS, seed=data.draw(st.integers(0, 999)))
    pins: tuple[str, ...] = ()
    if data.draw(st.booleans()):
        pins = (f"*.{keep[-1]}:input={data.draw(st.sampled_from(INPUTS))}",)
    problem = read_problem(made.profile, made.errors, made.sensitivity, formats=FORMATS, pins=pins)
    open_ = list(choices(problem, pairs))
    if not open_:
        with pytest.raises(PlanError, match="runs none of the formats"):
            constrain(problem, toy(pairs))
        return
    constrained = constrain(problem, toy(pairs))
    limits = []
    for name in data.draw(st.lists(st.sampled_from(sorted(BUDGETS)), max_size=2, unique=True)):
        if name == "time":
            continue
        cost = BUDGETS[name].cost(problem, None)
        totals = [cost.total(problem, choice) for choice in open_]
        share = data.draw(st.floats(0.0, 1.0))
        value = min(totals) + share * (max(totals) - min(totals))
        limits.append(Limit(budget=BUDGETS[name], value=value))

    target = objective(problem)
    fits = [
        target.total(problem, choice)
        for choice in open_
        if all(x.cost(problem).total(problem, choice) <= x.value * (1 + 1e-9) for x in limits)
    ]
    if not fits:
        with pytest.raises(BudgetError):
            best(constrained, limits)
        return
    found = best(constrained, limits)
    assert any((found.choice == choice).all() for choice in open_)
    assert found.value == pytest.approx(min(fits), rel=1e-9, abs=1e-15)
    assert found.gap == 0.0


def test_what_no_pair_uses_leaves_the_ladder(tables: Callable[..., Any]) -> None:
    made = tables(1, formats=FORMATS)
    problem = read_problem(made.profile, made.errors, made.sensitivity, formats=FORMATS)
    constrained = constrain(problem, TARGETS["torchao"])
    names = [str(f) for f in problem.formats]
    assert [names[f] for f in problem.ladder("input")] == ["int4-token", "int8-token"]
    assert [names[f] for f in constrained.ladder("input")] == ["int8-token", "int8-token"]
    assert [names[f] for f in constrained.ladder("weight")] == ["int4-g32", "int8-g32"]


def test_the_next_best_choice_is_one_that_the_target_runs(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    formats = ("nvfp4", "mxfp4", "fp8-e4m3")
    run = tables(2, formats=formats).write(tmp_path / "run")
    plan = make_plan(run, PlanOptions(formats=formats, target="vllm", input_bits=6)).plan
    chosen = plan.assignment
    seen = 0
    for site in plan.sites:
        if not site.planned or site.next_best is None:
            continue
        module, _, operand = site.site.rpartition(":")
        other = chosen[f"{module}:{'weight' if operand == 'input' else 'input'}"]
        taken = parse_format(site.next_best.format)
        pair = (taken, other) if operand == "weight" else (other, taken)
        assert TARGETS["vllm"].scheme(*pair) is not None
        seen += 1
    assert seen


def test_a_plan_for_vllm_says_what_nvfp4_cannot(tables: Callable[..., Any], tmp_path: Path) -> None:
    formats = ("nvfp4", "fp8-e4m3")
    run = tables(2, formats=formats).write(tmp_path / "run")
    made = make_plan(run, PlanOptions(formats=formats, target="vllm", input_bits=6))
    plan = made.plan
    # NVFP4 weights with 8-bit inputs at FC2 are no plan of vLLM's, so not one to compare with.
    assert not {"fc2", "kurtosis"} & set(made.frontier["label"])
    assert {"uniform", "uniform-8"} <= set(made.frontier["label"])
    for module in {s.site.rpartition(":")[0] for s in plan.sites if s.planned}:
        pair = plan.assignment[f"{module}:weight"], plan.assignment[f"{module}:input"]
        assert TARGETS["vllm"].scheme(*pair) is not None
    assert any("not as NVFP4" in note for note in plan.notes)


def test_of_weights_alone_the_pairs_with_bf16_inputs_hold(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    formats = ("int4-g32", "int8-g32", "fp8-e4m3")
    run = tables(2, formats=formats, inputs=False).write(tmp_path / "run")
    plan = make_plan(run, PlanOptions(formats=formats, target="vllm", weight_bits=6)).plan
    # vLLM has no FP8 weights with 16-bit inputs in this table.
    assert {str(s.format) for s in plan.sites if s.planned} == {"int4-g32", "int8-g32"}


def test_experts_of_a_layer_cannot_be_configured(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(2)]
    linears = describe([Linear(n, 64, 64) for n in (*names, "model.layers.0.mlp.down_proj")])
    formats = ("int4-g32", "int4-token", "int8-token")
    run = tables(linears=linears, formats=formats).write(tmp_path / "run")
    with pytest.raises(PlanError, match=r"at 2 linears .*experts of a layer are one parameter"):
        make_plan(run, PlanOptions(formats=formats, target="vllm"))
    out = PlanOptions(formats=formats, target="vllm", pins=("*.experts.*=bf16",))
    assert make_plan(run, out).plan.assignment[f"{names[0]}:weight"] == BF16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"target": "vllm", "formats": ("nvfp4", "fp8-e4m3"), "rule": "fc2"},
            "cannot run the plan of rule fc2: 2 linears .*: nvfp4 weights with fp8-e4m3 inputs",
        ),
        ({"target": "torchao"}, "runs no pair of int4-g128, int8-g128"),
        ({"target": "nowhere"}, "the targets are"),
        (
            {"target": "torchao", "formats": FORMATS, "pins": ("fc2:input=int4-token",)},
            "runs none of the formats at 2 linears",
        ),
        (
            {"target": "torchao", "formats": FORMATS, "input_bits": 5.0},
            "no plan meets input_bits <= 5: the smallest that can be met is 8",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    tables: Callable[..., Any], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    run = tables(2, formats=(*FORMATS, "nvfp4", "fp8-e4m3")).write(tmp_path / "run")
    with pytest.raises(PlanError, match=says):
        make_plan(run, PlanOptions(**options))
    assert not (run / "plan.json").exists()


@given(pairs=PAIRS, seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
# Inputs that cost the same whatever is chosen, and more than the weights.
@example(pairs={("int4-g32", "int4-g32"), ("int4-g32", "int4-token")}, seed=67)
def test_converge_keeps_to_the_pairs_and_to_the_fewest_bits(
    tables: Callable[..., Any], pairs: set[tuple[str, str]], seed: int
) -> None:
    made = tables(
        1, keep=("gate_proj", "up_proj", "down_proj"), extra=False, formats=FORMATS, seed=seed
    )
    problem = constrain(
        read_problem(made.profile, made.errors, made.sensitivity, formats=FORMATS), toy(pairs)
    )
    limit = Limit(budget=BUDGETS["input_bits"], value=np.inf)
    choice, _, (note,) = converge(problem, [limit])
    every = list(choices(problem, pairs))
    loss = {operand: objective(problem, (operand,)) for operand in ("weight", "input")}
    bits = BUDGETS["input_bits"].cost(problem, None)
    weights = loss["weight"].total(problem, choice)
    assert any(np.array_equal(choice, one) for one in every)
    assert weights == pytest.approx(min(loss["weight"].total(problem, c) for c in every))
    mine = ~problem.is_input
    beside = [c for c in every if np.array_equal(c[mine], choice[mine])]
    enough = [c for c in beside if loss["input"].total(problem, c) <= weights * (1 + 1e-9)]
    if enough:
        assert bits.total(problem, choice) == pytest.approx(
            min(bits.total(problem, c) for c in enough)
        )
    else:
        assert "cannot be reached" in note
