"""What the scaling law forecasts for a training to come, and predictions brought to its scale.

A profile measures what quantizing the checkpoint costs before any training; training repairs much
of that, and more of one operand than of the other, by an amount that depends on N, D and G. The
law (core/law.py) states what is left: of 4-bit weights, of 4-bit inputs, and of 4-bit inputs with
those of FC2 at 8 bits. So with `--tokens` the predictions of each of three kinds of sites are
multiplied by the factor that makes the three uniform plans cost what the law forecasts:

    weights       delta_w4a16 / sum over weights at the low format
    FC2 inputs    (delta_w16a4 - delta_w16a4+fc2) / what the FC2 inputs save from low to high
    other inputs  (delta_w16a4+fc2 - the FC2 inputs at high) / sum over the others at low

Within a kind the order of sites stays the profile's, so a limit on weights chooses as before. Under
one on inputs FC2 shifts against the others, and under one that both operands share (bit operations,
time), or with `--converge`, bits move from inputs to weights as D grows. Where a factor would not
be positive, all inputs get one. A law is of QAT from scratch, as the paper's, or of a few steps
from a trained model (`branched`): for any other training it is a lead.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bitplan.errors import PlanError
from bitplan.formats import Format, Operand
from bitplan.law import FC2_AT_8, PAPER, LawSet
from bitplan.planner.problem import Bools, Ints, Problem
from bitplan.planner.reasons import decisions
from bitplan.sites import OPERANDS, PLANNED_ROLES

LAW_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the law forecasts for N parameters, D tokens and the group sizes of the low formats."""

    params: float
    tokens: float
    weight_group_size: float
    input_group_size: float
    delta_weights: float
    """Nats per token, all weights at 4 bits."""
    delta_inputs: float
    delta_inputs_fc2_at_8: float
    R: float
    R_fc2_at_8: float
    crossover_tokens: float | None
    """D at which R is 1; with more tokens the weights cost more. None: they never do."""
    crossover_tokens_fc2_at_8: float | None
    extrapolates: tuple[str, ...]
    """What lies outside the ranges that the law was fitted on."""
    source: str
    branched: bool
    """Fitted to arms that branch from a trained model, and not to QAT from scratch."""
    why: str
    """Why this law, where several ship; "" where there was no choice."""


def outlook(problem: Problem, params: float, tokens: float, laws: LawSet = PAPER) -> Outlook:
    """Return the forecast; raise PlanError where the cheapest formats are not of 4 bits."""
    low = {o: _low(problem, o) for o in OPERANDS if o == "weight" or problem.has_inputs}
    group = {operand: _group_size(problem, operand, f) for operand, f in low.items()}
    weights, inputs = group["weight"], group.get("input", group["weight"])

    def ratio(fc2: bool) -> float:
        return laws.ratio(params, tokens, inputs, fc2_at_8=fc2, weight_group_size=weights)

    def crossover(fc2: bool) -> float | None:
        return laws.crossover_tokens(params, inputs, fc2_at_8=fc2, weight_group_size=weights)

    outside = laws.outside_grid(params=params, tokens=tokens)
    for operand, f in low.items():
        outside += [f"{operand} {x}" for x in laws.outside_grid(group_size=group[operand])]
        if f.kind != "int":
            outside.append(f"{f} {operand}s are not the integers that were fitted")
    return Outlook(
        params=params,
        tokens=tokens,
        weight_group_size=weights,
        input_group_size=inputs,
        delta_weights=laws.delta("w4a16", params, tokens, weights),
        delta_inputs=laws.delta("w16a4", params, tokens, inputs),
        delta_inputs_fc2_at_8=laws.delta("w16a4" + FC2_AT_8, params, tokens, inputs),
        R=ratio(False),
        R_fc2_at_8=ratio(True),
        crossover_tokens=crossover(False),
        crossover_tokens_fc2_at_8=crossover(True),
        extrapolates=tuple(outside),
        source=laws.source,
        branched=bool(laws.provenance.get("branched", False)),
        why=laws.why,
    )


def _low(problem: Problem, operand: Operand) -> Format:
    low = problem.formats[problem.ladder(operand)[0]]
    if low.bits != LAW_BITS:
        raise PlanError(
            f"--tokens: the law forecasts {LAW_BITS}-bit {operand}s, and the lowest of --formats "
            f"for them is {low}: add one of {LAW_BITS} bits, or drop --tokens"
        )
    return low


def _group_size(problem: Problem, operand: Operand, f: Format) -> float:
    """Return the elements that share a scale, on average where rows are shorter than a group."""
    share = np.where(problem.mask(operand), problem.weight_in_average, 0.0)
    rows = np.array([s.in_features for s in problem.sites])
    return float(share @ np.minimum(rows, f.group_size or rows))


def scale_to_law(problem: Problem, law: Outlook) -> tuple[Problem, dict[str, float]]:
    """Return the problem with predictions at the law's scale, and the factor of each kind of site.

    Without predicted losses there is nothing to scale, and no factor.
    """
    if not problem.in_nats:
        return problem, {}
    factors, kinds = _factors(problem, law), _kinds(problem)
    scale = sum((factor * kinds[name] for name, factor in factors.items()), start=0.0)
    scale = np.where(np.any(list(kinds.values()), axis=0), scale, 1.0)
    scaled = replace(
        problem,
        objective=problem.objective * scale[:, None],
        predicted_stderr=problem.predicted_stderr * scale[:, None],
    )
    return scaled, factors


def _kinds(problem: Problem) -> dict[str, Bools]:
    role = np.array([s.role for s in problem.sites])
    planned = np.isin(role, PLANNED_ROLES) | problem.counted
    return {
        "weights": planned & ~problem.is_input,
        "fc2_inputs": planned & problem.is_input & (role == "fc2"),
        "other_inputs": planned & problem.is_input & (role != "fc2"),
    }


def _factors(problem: Problem, law: Outlook) -> dict[str, float]:
    """Return the factor of each kind; 1 for one whose predictions are all 0."""
    loss = np.nan_to_num(problem.predicted, nan=0.0)
    kinds = _kinds(problem)

    def total(kind: str, f: int) -> float:
        return float(loss[kinds[kind], f].sum())

    def over(wanted: float, predicted: float) -> float:
        return wanted / predicted if predicted > 0 else 1.0

    factors = {"weights": over(law.delta_weights, total("weights", problem.ladder("weight")[0]))}
    if not problem.has_inputs:
        return factors
    low, high = problem.ladder("input")
    fc2, rest = total("fc2_inputs", low), total("other_inputs", low)
    raised = total("fc2_inputs", high)
    fc2_factor = over(law.delta_inputs - law.delta_inputs_fc2_at_8, fc2 - raised)
    left = law.delta_inputs_fc2_at_8 - fc2_factor * raised
    if problem.formats[high].bits >= 8 and min(fc2 - raised, rest, fc2_factor, left) > 0:
        return {**factors, "fc2_inputs": fc2_factor, "other_inputs": left / rest}
    return {**factors, **dict.fromkeys(kinds.keys() - factors, over(law.delta_inputs, fc2 + rest))}


def advise(
    problem: Problem, choice: Ints, law: Outlook, factors: Mapping[str, float]
) -> dict[str, Any]:
    """Return plan.json's `advice`: the forecast, and where the next bit after `choice` should go.

    With predicted losses the next bit goes to the operand that loses most less per average bit in
    its best single decision; without, to the inputs where R is above 1.
    """
    saves = {operand: _saves_per_bit(problem, choice, operand) for operand in OPERANDS}
    if problem.in_nats and problem.has_inputs:
        next_bit = "inputs" if saves["input"] > saves["weight"] else "weights"
    else:
        next_bit = "inputs" if law.R > 1 else "weights"
    known = problem.in_nats
    return {
        **asdict(law),
        "extrapolates": list(law.extrapolates),
        "factors": dict(factors) or None,
        "next_bit": next_bit,
        "saves_per_input_bit": saves["input"] if known and problem.has_inputs else None,
        "saves_per_weight_bit": saves["weight"] if known else None,
    }


def _saves_per_bit(problem: Problem, choice: Ints, operand: Operand) -> float:
    """Return the most that one decision saves per average bit of its operand that it adds."""
    tables = decisions(problem)
    best = 0.0
    for key, members in tables.members.items():
        if problem.sites[members[0]].operand == operand:
            f = choice[members[0]]
            more = tables.bits[key] - tables.bits[key][f]
            less = tables.objective[key][f] - tables.objective[key]
            dearer = tables.allowed[key] & (more > 0)
            best = max(best, *(less[dearer] / more[dearer]).tolist(), 0.0)
    return best
