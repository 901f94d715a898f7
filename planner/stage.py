"""`bitplan plan`: read the profile, choose formats, write plan.json and frontier.parquet.

The stage is a thin shell: problem.py reads, search.py decides, reasons.py explains. An operand
that no budget restrains keeps the default limit: weights what rule `uniform` uses, inputs what rule
`fc2` uses. So `--input-bits 5` alone plans 4-bit weights, and no option at all spends as the paper.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bitplan import law_choice
from bitplan.errors import PlanError, RunError
from bitplan.forecast import check_values
from bitplan.formats import Operand, parse_formats, short_groups_note
from bitplan.law import FC2_AT_8, LawSet
from bitplan.options import PlanOptions
from bitplan.planner.advice import Outlook, advise, outlook, scale_to_law
from bitplan.planner.budgets import BUDGETS, Limit, asked_limits, objective
from bitplan.planner.constrain import check_choice, constrain
from bitplan.planner.converge import converge
from bitplan.planner.frontier import FRONTIER_FILE, frontier
from bitplan.planner.plan import PLAN_FILE, Measured, Plan, Predicted, read_plan
from bitplan.planner.problem import Ints, Problem, read_problem
from bitplan.planner.quantizers import HADAMARD, named_quantizers
from bitplan.planner.reasons import explain, misleading_kurtosis
from bitplan.planner.refine import kl_of, stderr_of
from bitplan.planner.rules import RULES, find_rule
from bitplan.planner.search import best
from bitplan.planner.targets import check_family, check_formats, find_target
from bitplan.planner.text import plan_text
from bitplan.planner.trained import Trained, read_trained
from bitplan.rundir import RunDir, content_hash, file_hash, provenance_of
from bitplan.sites import PLANNED_ROLES
from bitplan.tables import ERRORS, PROFILE, SENSITIVITY, TRAINED

VERDICT = "verdict.json"
DEFAULT_RULES = (("weight_bits", "weight", "uniform"), ("input_bits", "input", "fc2"))
NEEDED = ("w4a16", "w16a4", "w16a4" + FC2_AT_8)
"""Precisions whose laws scale predictions."""


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


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A choice [S] that was measured whole, or the one it was refined to, and what to say of it."""

    choice: Ints
    measured: Measured
    notes: tuple[str, ...]


# From the run, the problem, its limits, the choice and the options to what measuring made of it.
Check = Callable[[RunDir, Problem, Sequence[Limit], Ints, PlanOptions], Checked]


def make_plan(run: Path, options: PlanOptions, check: Check | None = None) -> PlanResult:
    """Choose a format for every site of a profiled run and write RUN/plan.json and the frontier.

    check: measures the choice, as `options.measure` asks; the planner itself runs no model.
    Raises RunError for a run that is not profiled, PlanError for options that do not fit it, and
    BudgetError where no plan meets the budget. Nothing is written then.
    """
    directory = RunDir.open(run)
    with directory.lock():
        read = (PROFILE, ERRORS, SENSITIVITY, *([TRAINED] if options.converge else []))
        tables = {t.file: directory.path / t.file for t in read}
        if options.law is not None:
            tables["law"] = Path(options.law)
        found = {name: file_hash(path) for name, path in tables.items() if path.is_file()}
        if options.tokens is not None and "law" not in found:
            found["law"] = content_hash(list(map(asdict, law_choice.shipped().values())))
        key = {**asdict(options), "inputs": found}
        if directory.is_done("plan", key) or _stands(directory, key):
            # A damaged file is made again, which is what its error message asks for.
            with contextlib.suppress(PlanError, RunError):
                return PlanResult(
                    run=run,
                    plan=read_plan(directory),
                    frontier=directory.read_table(FRONTIER_FILE),
                    up_to_date=True,
                )
        plan, points = plan_of(directory, options, check)
        directory.commit("plan", key, {FRONTIER_FILE: points}, {PLAN_FILE: plan.as_json()})
    return PlanResult(run=run, plan=plan, frontier=points, up_to_date=False)


def _stands(directory: RunDir, key: Mapping[str, Any]) -> bool:
    """Return whether the plan is one of --converge, asked for alike, that verify found to converge.

    What verify trained for it is new to the planner, and no reason to plan again.
    """
    entry = directory.manifest["stages"].get("plan")
    if entry is None or not key["converge"] or not (directory.path / VERDICT).is_file():
        return False

    def asked(options: Mapping[str, Any]) -> str:
        inputs = {name: v for name, v in options["inputs"].items() if name != TRAINED.file}
        return content_hash({**options, "inputs": inputs})

    if asked(entry["options"]) != asked(key) or not directory.is_done("plan", entry["options"]):
        return False
    verdict, plan = directory.read_json(VERDICT), directory.read_json(PLAN_FILE)
    return (verdict["verdict"], verdict["plan_id"]) == ("converged", plan["plan_id"])


def plan_of(
    directory: RunDir, options: PlanOptions, check: Check | None = None
) -> tuple[Plan, pl.DataFrame]:
    """Return the plan of a profiled run and its frontier, writing nothing; raise as make_plan."""
    asked = asked_limits(options)
    _check_combination(options, asked)
    _check_provenance(directory)
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
        shares=options.shares,
    )
    if target is not None:
        problem = constrain(problem, target)
    _check_inputs(problem, options, asked)
    law = _outlook(directory, problem, options)
    factors: dict[str, float] = {}
    if law is not None:
        problem, factors = scale_to_law(problem, law)
    limits, notes = _limits(problem, options, asked)
    trained = _trained(directory, problem) if options.converge else None
    choice, gap, said = _choose(problem, options, limits, trained)
    if target is not None:
        if options.rule is not None:
            check_choice(problem, target, choice, _made_by(options))
        said += [f"target {target.name}: {note}" for note in target.notes]
    checked = None if check is None else check(directory, problem, limits, choice, options)
    if checked is not None:
        gap = gap if np.array_equal(choice, checked.choice) else None
        choice, said = checked.choice, [*said, *checked.notes]
    primary = (asked or _default_first(limits))[0]
    others = [limit for limit in limits if limit is not primary]
    points = frontier(problem, primary, others, choice)
    if options.rule is not None:
        limits = []
    quantizers = named_quantizers(problem.sites, options.quantizers)
    if rotated := {site.rpartition(":")[0] for site, q in quantizers.items() if q == HADAMARD}:
        said.append(
            f"{len(rotated)} linears are rotated in training ({HADAMARD}): predictions and what "
            "--measure measures are without it, and no export target runs it"
        )
    plan = Plan(
        made_by=_made_by(options),
        sites=explain(problem, choice, limits, options.rule),
        predicted=predicted(problem, choice, limits, trained),
        budget={limit.budget.name: limit.value for limit in limits if np.isfinite(limit.value)},
        device=next((limit.device.name for limit in limits if limit.device), None),
        measured=None if checked is None else checked.measured,
        optimality_gap=gap,
        formats=tuple(map(str, parse_formats(options.formats))),
        pins=options.pins,
        shares=options.shares,
        per_role=options.per_role,
        quantizers=quantizers,
        advice=None if law is None else advise(problem, choice, law, factors),
        notes=(*notes, *said, *_facts(problem, choice, limits, factors), *_weights_note(directory)),
        provenance=directory.provenance(),
    )
    return plan, points


def _outlook(directory: RunDir, problem: Problem, options: PlanOptions) -> Outlook | None:
    """Return the scaling law's forecast for --tokens, None without; raise for values of none."""
    if options.tokens is None:
        for name in ("params", "law"):
            if getattr(options, name) is not None:
                raise PlanError(
                    f"--{name} is for the forecast of --tokens: give both, e.g. 100e9 tokens"
                )
        return None
    params, laws = _training(directory, options)
    return outlook(problem, params, options.tokens, laws)


def _training(directory: RunDir, options: PlanOptions) -> tuple[float, LawSet]:
    """Return N of the training to come and its law; raise PlanError for a law that lacks rows."""
    params = options.params
    if params is None:
        params = directory.manifest.get("model", {}).get("num_non_embedding_parameters")
    if params is None:
        raise PlanError(f"{directory.path} does not say how many parameters there are: --params N")
    assert options.tokens is not None
    check_values(params=params, tokens=options.tokens)
    laws = law_choice.find_law(
        options.law, needs=NEEDED, params=float(params), tokens=options.tokens
    )
    if not all(laws.has_ratio(fc2_at_8=fc2) for fc2 in (False, True)):
        raise PlanError(
            f"--law {options.law}: a plan needs laws for w4a16, w16a4 and w16a4+fc2, and it has "
            f"{', '.join(laws.laws)}: fit it to trainings with FC2 inputs at 8 bits as well"
        )
    return float(params), laws


def _check_provenance(directory: RunDir) -> None:
    """Raise PlanError where a table says that it was made from another model than the run's."""
    here = directory.manifest.get("model", {}).get("content_hash")
    for table in (PROFILE, ERRORS, SENSITIVITY):
        path = directory.path / table.file
        if not path.is_file():
            continue
        there = provenance_of(path).get("model", {}).get("content_hash")
        if None not in (here, there) and here != there:
            raise PlanError(
                f"{path} was made from another checkpoint (content hash {there[:12]}, this run's "
                f"is {here[:12]}): profile again"
            )


def _made_by(options: PlanOptions) -> str:
    if options.rule is not None:
        return f"rule {options.rule}"
    return "converge" if options.converge else "optimal"


def _default_first(limits: Sequence[Limit]) -> list[Limit]:
    """Order the default limits so that the one on inputs, where there is one, leads."""
    return sorted(limits, key=lambda limit: list(BUDGETS).index(limit.budget.name))


def _check_combination(options: PlanOptions, asked: Sequence[Limit]) -> None:
    if options.rule is not None and (
        asked or options.converge or options.per_role or options.shares
    ):
        raise PlanError(
            f"--rule {options.rule} is a whole plan: drop it, or drop the budgets, --converge, "
            "--share and --per-role"
        )
    if options.measure and options.tokens is not None:
        raise PlanError(
            "--measure measures the checkpoint as it is, and --tokens plans for what a training "
            "leaves of it: give one of them"
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


def _trained(directory: RunDir, problem: Problem) -> Trained | None:
    """Return what verify has trained of this run, where it has."""
    if not (directory.path / TRAINED.file).is_file():
        return None
    return read_trained(problem, directory.read_table(TRAINED.file))


def _choose(
    problem: Problem, options: PlanOptions, limits: Sequence[Limit], trained: Trained | None
) -> tuple[Ints, float | None, list[str]]:
    """Return the choice, its optimality gap, and notes about how it was found."""
    if options.rule is not None:
        rule = find_rule(options.rule, problem)
        return rule.choice(problem), None, [f"rule {rule.name}: {rule.meaning}"]
    if options.converge:
        return converge(problem, limits, trained)
    found = best(problem, limits)
    return found.choice, found.gap, []


def predicted(
    problem: Problem, choice: Ints, limits: Sequence[Limit], trained: Trained | None = None
) -> Predicted:
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
        R_trained=trained.ratio(inputs, weights) if trained and weights > 0 else None,
        weight_bits=used("weight_bits"),
        input_bits=used("input_bits"),
        bit_ops=used("bit_ops"),
        bytes=used("bytes") or 0.0,
        time_ms=None if time is None else time.cost(problem).total(problem, choice),
        stderr=stderr_of(problem, choice) if problem.in_nats else None,
        kl=kl_of(problem, choice) if problem.in_nats else None,
    )


def _weights_note(directory: RunDir) -> list[str]:
    note = directory.manifest.get("model", {}).get("weights_note")
    return [note] if note else []


def _facts(
    problem: Problem, choice: Ints, limits: Sequence[Limit], factors: Mapping[str, float]
) -> list[str]:
    """Return what a reader of the plan should know about where its numbers come from."""
    notes = []
    if not problem.has_inputs:
        notes.append("weights only were profiled: inputs are not planned")
    if problem.in_nats:
        used = np.take_along_axis(problem.method, choice[:, None], axis=1)[problem.counted]
        methods = Counter(method for method in used.ravel().tolist() if method)
        by = ", ".join(f"{kind.replace('_', ' ')} x {x:.3g}" for kind, x in factors.items())
        scaled = f", brought to the scaling law ({by})" if by else ""
        counts = " and ".join(f"{n} sites by {method}" for method, n in sorted(methods.items()))
        notes.append(
            f"predictions add up single-site changes of loss ({counts}), shrunk by their "
            f"noise{scaled}; `--measure` measures the sum, `bitplan verify` trains under it"
        )
        notes.extend(problem.notes)
    else:
        notes.append(
            "no sensitivity was profiled: the plan minimizes the relative quantization error "
            "weighted by MACs and parameters, and predicts no loss"
        )
    outside = [s for s, c in zip(problem.sites, problem.counted, strict=True) if not c]
    if kept := [s for s in outside if s.role in PLANNED_ROLES]:
        pins = ", ".join(dict.fromkeys(str(problem.pins[s.site]) for s in kept))
        notes.append(f"{len(kept)} sites are kept at bf16 by {pins}: outside every average")
    if stay := dict.fromkeys(s.role for s in outside if s.role not in PLANNED_ROLES):
        notes.append(
            f"{', '.join(stay)}: not among {', '.join(PLANNED_ROLES)}, so bf16 and outside every "
            "average; include one with --pin ROLE=FORMAT"
        )
    for device in [limit.device for limit in limits if limit.device]:
        notes.append(
            "time counts the planned linears at the published dense rate: a lower bound; rates: "
            f"{device.source}"
        )
    used_formats = (problem.formats[f] for f in choice)
    rows = (site.in_features for site in problem.sites)
    notes += short_groups_note(zip(used_formats, rows, strict=True))
    if count := int(misleading_kurtosis(problem).sum()):
        notes.append(f"{count} inputs have high kurtosis but low sensitivity: see their reasons")
    return notes
