"""Rules: plans made without looking at sensitivity, for comparison and for those who want one.

A rule raises some sites from the low to the high format (`Problem.ladder`). Pins hold within rules.
The last two spend on inputs what `fc2` spends: same cost, another choice of sites.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitplan.errors import PlanError
from bitplan.formats import Operand
from bitplan.planner.budgets import BUDGETS
from bitplan.planner.problem import UNFIXED, Bools, Ints, Problem
from bitplan.planner.solve import SLACK


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A named choice: `raised` returns [S], the sites that take the high format."""

    name: str
    meaning: str
    raised: Callable[[Problem], Bools]
    about_inputs: bool = False
    """Whether it is `uniform` where there are no inputs, and then left out."""

    def choice(self, problem: Problem) -> Ints:
        """Return the rule's choice [S]."""
        return _ladder_choice(problem, self.raised(problem))


def _ladder_choice(problem: Problem, raised: Bools) -> Ints:
    choice = problem.fixed.copy()
    operands: tuple[Operand, ...] = ("weight", "input") if problem.has_inputs else ("weight",)
    for operand in operands:
        low, high = problem.ladder(operand)
        mine = (problem.fixed == UNFIXED) & (problem.is_input == (operand == "input"))
        choice[mine] = np.where(raised[mine], high, low)
    return choice


def _none(problem: Problem) -> Bools:
    return np.zeros(len(problem.sites), dtype=bool)


def _all(problem: Problem) -> Bools:
    return np.ones(len(problem.sites), dtype=bool)


def _fc2(problem: Problem) -> Bools:
    return np.array([s.role == "fc2" and s.operand == "input" for s in problem.sites])


def _first_last(problem: Problem) -> Bools:
    blocks = [s.block for s in problem.sites if s.block is not None]
    ends = {min(blocks), max(blocks)} if blocks else set()
    return np.array([s.block in ends for s in problem.sites])


def _by_kurtosis(problem: Problem) -> Bools:
    return _greedy(problem, [s.kurtosis for s in problem.sites])


def _by_error(problem: Problem) -> Bools:
    low, _ = problem.ladder("input")
    return _greedy(problem, problem.relative_error[:, low])


def _greedy(problem: Problem, score: Iterable[float | None] | NDArray[Any]) -> Bools:
    """Raise whole input groups by falling score, each that still fits what `fc2` spends."""
    raised = _none(problem)
    if not problem.has_inputs:
        return raised
    low, high = problem.ladder("input")
    cost = BUDGETS["input_bits"].cost(problem, None)
    limit = cost.total(problem, RULES["fc2"].choice(problem)) * (1 + SLACK)
    used = cost.total(problem, RULES["uniform"].choice(problem))
    scores = np.nan_to_num(np.array([np.nan if v is None else v for v in score], float), nan=-1.0)
    free = problem.is_input & (problem.fixed == UNFIXED)
    groups = defaultdict(list)
    for i in np.flatnonzero(free).tolist():
        groups[problem.sites[i].fused or problem.sites[i].module].append(i)
    for sites in sorted(groups.values(), key=lambda sites: (-scores[sites].max(), sites[0])):
        more = float((cost.site[sites, high] - cost.site[sites, low]).sum())
        if used + more <= limit:
            used += more
            raised[sites] = True
    return raised


RULES = {
    rule.name: rule
    for rule in (
        Rule(name="uniform", meaning="every site low", raised=_none),
        Rule(name="uniform-8", meaning="every site high", raised=_all),
        Rule(
            name="fc2",
            meaning="every FC2 input high, as in the paper (arXiv 2505.14302)",
            raised=_fc2,
            about_inputs=True,
        ),
        Rule(name="first-last", meaning="first and last block high", raised=_first_last),
        Rule(
            name="kurtosis",
            meaning="inputs of highest kurtosis high, at the cost of fc2",
            raised=_by_kurtosis,
            about_inputs=True,
        ),
        Rule(
            name="sqnr",
            meaning="inputs of largest relative error high, at the cost of fc2",
            raised=_by_error,
            about_inputs=True,
        ),
    )
}


def find_rule(name: str, problem: Problem) -> Rule:
    """Return the rule of a name; raise PlanError for an unknown one, or one that needs inputs."""
    if name not in RULES:
        known = "; ".join(f"{rule.name} ({rule.meaning})" for rule in RULES.values())
        raise PlanError(f"unknown rule {name!r}: the rules are {known}")
    rule = RULES[name]
    if rule.about_inputs and not problem.has_inputs:
        raise PlanError(
            f"rule {name} is about inputs, and this run profiled weights only: profile without "
            "--weights-only"
        )
    return rule


def rules_for(problem: Problem) -> list[Rule]:
    """Return the rules that say something about this problem."""
    return [rule for rule in RULES.values() if problem.has_inputs or not rule.about_inputs]
