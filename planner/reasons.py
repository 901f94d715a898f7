"""Why each site got its format, in one line, and the same as fields.

A decision is taken for a group of linears (one, a fused set, a role) and an operand; the next-best
choice is what its cheapest improvement would have saved, or, where there is none, what its best
cheaper format would have cost. Kurtosis is shown where it misleads: high, on an input that does not
suffer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitplan.planner.budgets import Cost, Limit, held, objective, share_cost, share_limit
from bitplan.planner.plan import NextBest, SiteChoice
from bitplan.planner.predict import Floats
from bitplan.planner.problem import UNFIXED, Bools, Ints, Problem
from bitplan.planner.search import open_beside
from bitplan.planner.solve import SLACK

HIGH_KURTOSIS = 10.0
TOP_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Sums over the sites that decide together: [group, operand, F]."""

    objective: Floats
    bits: Floats
    allowed: Bools
    possible: Bools
    """Whether the limits leave room for the format if everything else is as cheap as can be."""
    shared: Bools
    """The same of the shares."""
    members: dict[tuple[int, int], list[int]]


def explain(
    problem: Problem, choice: Ints, limits: Sequence[Limit], rule: str | None = None
) -> tuple[SiteChoice, ...]:
    """Return the entry of every site for a choice [S] that was made under the limits."""
    tables = decisions(problem, limits)
    if problem.pairs is not None:
        tables = replace(tables, allowed=tables.allowed & open_beside(problem, choice))
    misleads = misleading_kurtosis(problem)
    return tuple(
        _explain_site(problem, choice, tables, i, rule, bool(misleads[i]))
        for i in range(len(problem.sites))
    )


def misleading_kurtosis(problem: Problem) -> Bools:
    """Return [S]: inputs whose kurtosis is in the top tenth (and above 10) of the planned inputs
    while their predicted cost at the low format, per multiply-accumulate, is below the median.
    """
    mask = problem.mask("input") & (problem.weight_in_average > 0)
    out = np.zeros(len(problem.sites), dtype=bool)
    if mask.sum() < 4:
        return out
    low, _ = problem.ladder("input")
    known = np.array([np.nan if s.kurtosis is None else s.kurtosis for s in problem.sites])
    kurtosis = np.nan_to_num(known, nan=0.0)
    harm = np.divide(
        problem.objective[:, low], problem.weight_in_average, out=np.zeros(len(out)), where=mask
    )
    high = kurtosis >= max(float(np.quantile(kurtosis[mask], TOP_SHARE)), HIGH_KURTOSIS)
    low_harm = harm < np.median(harm[mask])
    out |= mask & high & low_harm & (problem.fixed == UNFIXED)
    return out


def decisions(problem: Problem, limits: Sequence[Limit] = ()) -> Decisions:
    """Return what the formats of each decision cost, and which of them the limits leave."""
    groups, formats = int(problem.group.max()) + 1, len(problem.formats)
    where = (problem.group[problem.linear], problem.is_input.astype(int))

    def add_up(table: Floats) -> Floats:
        out = np.zeros((groups, 2, formats))
        np.add.at(out, where, held(problem, table))
        return out

    undecided = problem.fixed == UNFIXED
    allowed = np.ones((groups, 2, formats), dtype=bool)
    np.logical_and.at(
        allowed, (where[0][undecided], where[1][undecided]), problem.allowed[undecided]
    )

    def leave(bounds: Sequence[tuple[Cost, float]]) -> Bools:
        left = allowed.copy()
        for cost, bound in bounds:
            if cost.pair is None:
                table = np.where(allowed, add_up(cost.site), np.inf)
                least = table.min(axis=2, keepdims=True)
                room = bound * (1 + SLACK) - float(least.sum())
                left &= table - least <= max(room, 0.0) + SLACK * abs(bound)
        return left

    members: dict[tuple[int, int], list[int]] = {}
    for i in np.flatnonzero(undecided).tolist():
        members.setdefault((int(where[0][i]), int(where[1][i])), []).append(i)
    return Decisions(
        objective=add_up(objective(problem).site),
        bits=add_up(problem.weight_in_average[:, None] * problem.bits),
        allowed=allowed,
        possible=leave([(limit.cost(problem), limit.value) for limit in limits]),
        shared=leave([(share_cost(problem, s), share_limit(problem, s)) for s in problem.shares]),
        members=members,
    )


def _explain_site(
    problem: Problem, choice: Ints, tables: Decisions, i: int, rule: str | None, misleads: bool
) -> SiteChoice:
    site, f = problem.sites[i], int(choice[i])
    format_ = problem.formats[f]
    key = (int(problem.group[problem.linear[i]]), int(problem.is_input[i]))
    forced, next_best = None, None
    if problem.fixed[i] != UNFIXED:
        forced = "pin" if site.site in problem.pins else "role"
    else:
        next_best = _next_best(problem, tables, key, f)
        if rule is not None:
            forced = "rule"
        elif tables.shared[key].sum() == 1:
            forced = "share"
        elif (tables.possible & tables.shared)[key].sum() == 1:
            forced = "budget"
    together = [problem.sites[j].module for j in tables.members.get(key, ()) if j != i]
    return SiteChoice(
        site=site.site,
        format=format_,
        role=site.role,
        block=site.block,
        planned=bool(problem.counted[i]),
        bits=float(problem.bits[i, f]),
        delta_loss=float(problem.objective[i, f]) if problem.in_nats else None,
        raw_delta_loss=_number(problem.raw[i, f]),
        stderr=_number(problem.stderr[i, f]),
        method=problem.method[i, f],
        relative_error=_number(problem.relative_error[i, f]),
        forced=forced,
        next_best=next_best,
        kurtosis_misleads=misleads,
        reason="; ".join(_reason(problem, i, f, forced, next_best, together, rule, misleads)),
    )


def _next_best(
    problem: Problem, tables: Decisions, key: tuple[int, int], f: int
) -> NextBest | None:
    """Return the cheapest format that predicts less loss; without one, the best cheaper one."""
    value, bits = tables.objective[key], tables.bits[key]
    others = [g for g in np.flatnonzero(tables.allowed[key]).tolist() if g != f]
    if better := [g for g in others if value[g] < value[f]]:
        best = min(better, key=lambda g: (bits[g], value[g], g))
    elif others:
        best = min(others, key=lambda g: (value[g], bits[g], g))
    else:
        return None
    return NextBest(
        format=str(problem.formats[best]),
        delta_loss=float(value[best] - value[f]),
        bits=float(bits[best] - bits[f]),
    )


def _reason(
    problem: Problem,
    i: int,
    f: int,
    forced: str | None,
    next_best: NextBest | None,
    together: list[str],
    rule: str | None,
    misleads: bool,
) -> list[str]:
    """Return the parts of the line."""
    site = problem.sites[i]
    if forced == "role":
        return [f"role {site.role} stays {problem.formats[f]}, outside the averages"]
    parts = []
    if forced == "pin":
        outside = "" if problem.counted[i] else ", outside the averages"
        parts.append(f"pinned by {problem.pins[site.site]}{outside}")
    elif forced == "rule":
        parts.append(f"rule {rule}")
    elif forced == "share":
        parts.append("the shares leave no other format")
    elif forced == "budget":
        parts.append("the budget leaves no other format")
    parts.append(_sensitivity(problem, i, f))
    if next_best is not None:
        parts.append(_alternative(next_best, site.operand, problem.in_nats))
    if together:
        shown = ", ".join(name.rpartition(".")[2] for name in together[:3])
        more = f" and {len(together) - 3} more" if len(together) > 3 else ""
        parts.append(f"one choice with {shown}{more}")
    if misleads:
        parts.append(f"kurtosis {site.kurtosis:.0f} is high but sensitivity low")
    return parts


def _sensitivity(problem: Problem, i: int, f: int) -> str:
    value, raw = problem.objective[i, f], problem.raw[i, f]
    if problem.sites[i].tokens == 0:
        return "no calibration token came here"
    if not problem.in_nats:
        return f"relative error {problem.relative_error[i, f]:.2g}"
    if problem.formats[f].is_quantized is False:
        return "not quantized"
    stderr = problem.stderr[i, f]
    spread = f" +- {stderr:.1g}" if math.isfinite(stderr) else ""
    text = f"predicted {value:+.2g} nats ({problem.method[i, f]} {raw:+.2g}{spread})"
    return text if math.isfinite(raw) else f"predicted {value:+.2g} nats"


def _alternative(next_best: NextBest, operand: str, in_nats: bool) -> str:
    unit = "nats" if in_nats else "of weighted error"
    loss, bits = next_best.delta_loss, next_best.bits
    verb = "save" if loss < 0 else "add"
    price = f"{'cost' if bits >= 0 else 'free'} {abs(bits):.2g} of average {operand} bits"
    if loss == 0:
        return f"{next_best.format} would change no prediction and {price}"
    return f"{next_best.format} would {verb} {abs(loss):.2g} {unit} and {price}"


def _number(value: float) -> float | None:
    """Return a JSON number: null for NaN."""
    return float(value) if math.isfinite(value) else None
