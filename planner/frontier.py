"""The frontier: the best predicted loss at every price, and where the rules stand beside it.

Every point is a plan, solved exactly. The other limits stay as they are while the budgeted quantity
goes from the cheapest plan to the one that would be chosen if it cost nothing. Rules' plans that a
target cannot run are left out.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from bitplan.planner.budgets import BUDGETS, Limit, objective
from bitplan.planner.problem import Ints, Problem
from bitplan.planner.rules import rules_for
from bitplan.planner.search import Search, runs
from bitplan.progress import track
from bitplan.rundir import content_hash
from bitplan.tables import FRONTIER

POINTS = 25
FRONTIER_FILE = FRONTIER.file
OPTIMAL, CHOSEN = "optimal", "plan"


def frontier(
    problem: Problem, primary: Limit, others: Sequence[Limit], chosen: Ints, points: int = POINTS
) -> pl.DataFrame:
    """Return the FRONTIER table: `points` optimal plans, the rules' plans and the chosen one.

    `primary` is the budget whose limit varies; its own value sets the limit of the chosen plan.
    """
    cost = primary.cost(problem)
    costs = [cost, *(limit.cost(problem) for limit in others)]
    fixed = [limit.value for limit in others]
    cheapest = Search(problem, cost, costs[1:]).solve(fixed)
    search = Search(problem, objective(problem), costs)
    freest = search.solve([cost.ceiling, *fixed])
    assert cheapest is not None
    assert freest is not None
    low, high = cheapest.value, cost.total(problem, freest.choice)
    rows = []
    for limit in track(np.linspace(low, high, points).tolist(), "frontier", total=points):
        found = search.solve([limit, *fixed])
        assert found is not None
        rows.append(_row(problem, primary, OPTIMAL, limit, found.choice))
    for rule in rules_for(problem):
        if runs(problem, choice := rule.choice(problem)):
            rows.append(_row(problem, primary, rule.name, None, choice))
    rows.append(_row(problem, primary, CHOSEN, primary.value, chosen))
    return FRONTIER.frame(rows)


def _row(
    problem: Problem, primary: Limit, label: str, limit: float | None, choice: Ints
) -> dict[str, str | float | None]:
    target = objective(problem).total(problem, choice)
    average = {
        name: BUDGETS[name].cost(problem, None).total(problem, choice)
        for name in ("weight_bits", "input_bits")
    }
    return {
        "label": label,
        "budget": primary.budget.name,
        "limit": limit if limit is None or np.isfinite(limit) else None,
        "cost": primary.cost(problem).total(problem, choice),
        "delta_loss": target if problem.in_nats else None,
        "objective": target,
        "weight_bits": average["weight_bits"],
        "input_bits": average["input_bits"] if problem.has_inputs else None,
        "plan_id": content_hash(spelled(problem, choice)),
    }


def spelled(problem: Problem, choice: Ints) -> dict[str, str]:
    """Return site to format, as text."""
    names = [str(f) for f in problem.formats]
    return {s.site: names[f] for s, f in zip(problem.sites, choice.tolist(), strict=True)}
