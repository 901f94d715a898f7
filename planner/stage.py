"""`bitplan plan`: read the profile, choose formats, write plan.json and frontier.parquet.

The stage is a thin shell: problem.py reads, search.py decides, reasons.py explains. An operand
that no budget restrains keeps the default limit: weights what rule `uniform` uses, inputs what rule
`fc2` uses. So `--input-bits 5` alone plans 4-bit weights, and no option at all spends as the paper.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bitplan.errors import PlanError, RunError
from bitplan.formats import Operand, parse_formats
from bitplan.options import PlanOptions
from bitplan.planner.budgets import BUDGETS, Limit, asked_limits, objective
from bitplan.planner.constrain import check_choice, constrain
from bitplan.planner.converge import converge
from bitplan.planner.frontier import FRONTIER_FILE, frontier
from bitplan.planner.plan import PLAN_FILE, Plan, Predicted, read_plan
from bitplan.planner.problem import Ints, Problem, read_problem
from bitplan.planner.reasons import explain, misleading_kurtosis
from bitplan.planner.rules import RULES, find_rule
from bitplan.planner.search import best
from bitplan.planner.targets import check_family, check_formats, find_target
from bitplan.planner.text import plan_text
from bitplan.rundir import RunDir, file_hash
from bitplan.sites import PLANNED_ROLES
from bitplan.tables import ERRORS, PROFILE, SENSITIVITY

DEFAULT_RULES = (("weight_bits", "weight", "uniform"), ("input_bits", "input", "fc2"))


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """A plan, its frontier, and whether they were there already."""

    run: Path
    plan: Plan
    frontier: pl.DataFrame
    up_to_date: bool

    def as_text(self) -> str:
        """Return the map, the totals, what was written and the next command."""
        state = "up to date" if self.up_to_date else "wrote"
        files = f"{state}: {self.run / PLAN_FILE}, {self.run / FRONTIER_FILE}"
        return f"{plan_text(self.plan, self.frontier)}\n\n{files}\nnext: bitplan verify {self.run}"

    def as_json(self) -> dict[str, Any]:
        """Return the plan, the frontier's rows and the files."""
        return {
            "up_to_date": self.up_to_date,
            "written": [str(self.run / name) for name in (PLAN_FILE, FRONTIER_FILE)],
            "plan": self.plan.as_json(),
            "frontier": self.frontier.to_dicts(),
            "next": f"bitplan verify {self.run}",
        }


def make_plan(run: Path, options: PlanOptions) -> PlanResult:
    """Choose a format for every site of a profiled run and write RUN/plan.json and the frontier.

    Raises RunError for a run that is not profiled, PlanError for options that do not fit it, and
    BudgetError where no plan meets the budget. Nothing is written then.
    """
    directory = RunDir.open(run)
    with directory.lock():
        tables = {t.file: directory.path / t.file for t in (PROFILE, ERRORS, SENSITIVITY)}
        found = {name: file_hash(path) for name, path in tables.items() if path.is_file()}
        key = {**asdict(options), "inputs": found}
        if directory.is_done("plan", key):
            # A damaged file is made again, which is what its error message asks for.
            with contextlib.suppress(PlanError, RunError):
                return PlanResult(
                    run=run,
                    plan=read_plan(directory),
                    frontier=directory.read_table(FRONTIER_FILE),
                    up_to_date=True,
                )
        plan, points = plan_of(directory, options)
        directory.commit("plan", key, {FRONTIER_FILE: points}, {PLAN_FILE: plan.as_json()})
    return PlanResult(run=run, plan=plan, frontier=points, up_to_date=False)


def plan_of(directory: RunDir, options: PlanOptions) -> tuple[Plan, pl.DataFrame]:
    """Return the plan of a profiled run and its frontier, writing nothing; raise as make_plan."""
    asked = asked_limits(options)
    _check_combination(options, asked)
    target = None if options.target is None else find_target(options.target)
    profile, errors = (directory.read_table(t.file) for t in (PROFILE, ERRORS))
    if target is not None:
        inputs = (profile["operand"] == "input").any()
        check_family(target, directory.manifest.get("model", {}).get("family"))
        check_formats(target, parse_formats(options.formats), inputs=inputs)
    measured = (directory.path / SENSITIVITY.file).is_file()
    problem = read_problem(
        profile,
        errors,
        directory.read_table(SENSITIVITY.file) if measured else None,
        formats=options.formats,
        pins=options.pins,
        per_role=options.per_role,
    )
    if target is not None:
        problem = constrain(problem, target)
    _check_inputs(problem, options, asked)
    limits, notes = _limits(problem, options, asked)
    choice, gap, said = _choose(problem, options, limits)
    if target is not None:
        if options.rule is not None:
            check_choice(problem, target, choice, _made_by(options))
        said += [f"target {target.name}: {note}" for note in target.notes]
    primary = (asked or _default_first(limits))[0]
    others = [limit for limit in limits if limit is not primary]
    points = frontier(problem, primary, others, choice)
    if options.rule is not None:
        limits = []
    plan = Plan(
        made_by=_made_by(options),
        sites=explain(problem, choice, limits, options.rule),
        predicted=predicted(problem, choice, limits),
        budget={limit.budget.name: limit.value for limit in limits if np.isfinite(limit.value)},
        device=next((limit.device.name for limit in limits if limit.device), None),
        optimality_gap=gap,
        formats=options.formats,
        pins=options.pins,
        per_role=options.per_role,
        notes=(*notes, *said, *_facts(problem, choice, limits), *_weights_note(directory)),
        provenance=directory.provenance(),
    )
    return plan, points


def _made_by(options: PlanOptions) -> str:
    if options.rule is not None:
        return f"rule {options.rule}"
    return "converge" if options.converge else "optimal"


def _default_first(limits: Sequence[Limit]) -> list[Limit]:
    """Order the default limits so that the one on inputs, where there is one, leads."""
    return sorted(limits, key=lambda limit: list(BUDGETS).index(limit.budget.name))


def _check_combination(options: PlanOptions, asked: Sequence[Limit]) -> None:
    if options.rule is not None and (asked or options.converge or options.per_role):
        raise PlanError(
            f"--rule {options.rule} is a whole plan: drop it, or drop the budgets, --converge and "
            "--per-role"
        )
    if options.converge and options.target is not None:
        raise PlanError(
            "--converge chooses weights and inputs apart, and a target runs some pairs only: "
            "drop one of --converge and --target"
        )
    pairs = [limit.budget.name for limit in asked if len(limit.budget.operands) > 1]
    if options.converge and pairs:
        raise PlanError(
            f"--converge balances inputs against given weights, and {', '.join(pairs)} limits both "
            "together: use --weight-bits, --bytes or --input-bits beside it"
        )


def _check_inputs(problem: Problem, options: PlanOptions, asked: Sequence[Limit]) -> None:
    """Raise PlanError where what is asked needs what the profile has not measured."""
    if not problem.has_inputs:
        needs = [f"--{x.budget.name.replace('_', '-')}" for x in asked if x.budget.needs_inputs]
        if needs or options.converge:
            raise PlanError(
                f"{', '.join(needs) or '--converge'} needs inputs, and this run profiled weights "
                "only: use --weight-bits or --bytes, or profile without --weights-only"
            )
    if options.converge and not problem.in_nats:
        raise PlanError(
            "--converge compares predicted losses, and this run has no sensitivity.parquet: "
            "profile without --no-sensitivity"
        )


def _limits(
    problem: Problem, options: PlanOptions, asked: Sequence[Limit]
) -> tuple[list[Limit], list[str]]:
    """Return the asked limits with the default of each operand that none of them restrains."""
    limits, notes = list(asked), []
    restrained = {operand for limit in asked for operand in limit.budget.operands}
    operands: tuple[Operand, ...] = ("weight", "input") if problem.has_inputs else ("weight",)
    for name, operand, rule in DEFAULT_RULES:
        if operand in restrained or operand not in operands:
            continue
        budget = BUDGETS[name]
        cost = budget.cost(problem, None)
        if options.converge and operand == "input":
            limits.append(Limit(budget=budget, value=np.inf))
            continue
        value = cost.total(problem, RULES[rule].choice(problem))
        limits.append(Limit(budget=budget, value=value))
        if options.rule is None:
            notes.append(
                f"no budget was asked for {operand}s: {name} <= {value:.6g}, what rule {rule} uses"
            )
    return limits, notes


def _choose(
    problem: Problem, options: PlanOptions, limits: Sequence[Limit]
) -> tuple[Ints, float | None, list[str]]:
    """Return the choice, its optimality gap, and notes about how it was found."""
    if options.rule is not None:
        rule = find_rule(options.rule, problem)
        return rule.choice(problem), None, [f"rule {rule.name}: {rule.meaning}"]
    if options.converge:
        return converge(problem, limits)
    found = best(problem, limits)
    return found.choice, found.gap, []


def predicted(problem: Problem, choice: Ints, limits: Sequence[Limit]) -> Predicted:
    """Return what a choice [S] is predicted to cost, in every unit that the profile allows."""
    weights = objective(problem, ("weight",)).total(problem, choice)
    inputs = objective(problem, ("input",)).total(problem, choice)
    time = next((limit for limit in limits if limit.device), None)

    def used(name: str) -> float | None:
        budget = BUDGETS[name]
        if budget.needs_inputs and not problem.has_inputs:
            return None
        return budget.cost(problem, None).total(problem, choice)

    both = problem.in_nats and problem.has_inputs
    return Predicted(
        objective=objective(problem).total(problem, choice),
        delta_loss=weights + inputs if problem.in_nats else None,
        delta_loss_weights=weights if problem.in_nats else None,
        delta_loss_inputs=inputs if both else None,
        R=inputs / weights if both and weights > 0 else None,
        weight_bits=used("weight_bits"),
        input_bits=used("input_bits"),
        bit_ops=used("bit_ops"),
        bytes=used("bytes") or 0.0,
        time_ms=None if time is None else time.cost(problem).total(problem, choice),
    )


def _weights_note(directory: RunDir) -> list[str]:
    note = directory.manifest.get("model", {}).get("weights_note")
    return [note] if note else []


def _facts(problem: Problem, choice: Ints, limits: Sequence[Limit]) -> list[str]:
    """Return what a reader of the plan should know about where its numbers come from."""
    notes = []
    if not problem.has_inputs:
        notes.append("weights only were profiled: inputs are not planned")
    if problem.in_nats:
        used = np.take_along_axis(problem.method, choice[:, None], axis=1)[problem.counted]
        methods = Counter(method for method in used.ravel().tolist() if method)
        counts = " and ".join(f"{n} sites by {method}" for method, n in sorted(methods.items()))
        notes.append(
            f"predictions add up single-site changes of loss ({counts}), noise below zero "
            "removed; `bitplan verify` measures the sum"
        )
    else:
        notes.append(
            "no sensitivity was profiled: the plan minimizes the relative quantization error "
            "weighted by MACs and parameters, and predicts no loss"
        )
    stay = dict.fromkeys(
        s.role for s, c in zip(problem.sites, problem.counted, strict=True) if not c
    )
    if stay:
        notes.append(
            f"{', '.join(stay)}: not among {', '.join(PLANNED_ROLES)}, so bf16 and outside every "
            "average; include one with --pin ROLE=FORMAT"
        )
    if any(limit.device for limit in limits):
        notes.append("time counts the planned linears at the published dense rate: a lower bound")
    if count := int(misleading_kurtosis(problem).sum()):
        notes.append(f"{count} inputs have high kurtosis but low sensitivity: see their reasons")
    return notes
