"""The cheapest inputs that come to cost no more loss than the weights: R <= 1.

Weights first, the best under their own limits; then the fewest input bits whose loss is at most
that of the weights; then, at that many bits, the least loss. All three are exact.

The losses compared are those after training where verify has trained arms of this run (see
trained.py), and the checkpoint's own where it has not. Each verify of a plan adds a point, so that
planning and verifying in turn closes in on R = 1.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bitplan.planner.budgets import BUDGETS, Limit, objective
from bitplan.planner.problem import Ints, Problem
from bitplan.planner.search import Found, Search, best
from bitplan.planner.trained import Trained


def converge(
    problem: Problem, limits: Sequence[Limit], trained: Trained | None = None
) -> tuple[Ints, float, list[str]]:
    """Return the choice [S], its optimality gap and a note with the R it reaches.

    `limits` restrain weights, inputs or neither; where R <= 1 cannot be reached under them, the
    inputs of least predicted loss are taken, at the fewest bits.
    """
    weights = best(
        problem,
        [limit for limit in limits if "input" not in limit.budget.operands],
        objective(problem, ("weight",)),
    )
    # With a target, the weights' formats decide which the inputs may take.
    fixed = np.where(problem.is_input, problem.fixed, weights.choice)
    problem = replace(problem, fixed=fixed)
    loss = objective(problem, ("input",))
    bits = BUDGETS["input_bits"].cost(problem, None)
    caps = [limit for limit in limits if limit.budget.name == "input_bits"]
    cap = min([bits.ceiling, *(limit.value for limit in caps)])
    fewest = Search(problem, bits, [loss, bits])
    found = fewest.solve([_equal(weights.value, trained), cap])
    reached = found is not None
    if found is None:
        least = best(problem, [limit for limit in caps if np.isfinite(limit.value)], loss)
        found = fewest.solve([least.value, cap])
        assert found is not None
    final = Search(problem, loss, [bits]).solve([bits.total(problem, found.choice)])
    assert final is not None
    gap = max(weights.gap, found.gap, final.gap)
    return final.choice, gap, [_note(final, weights, trained, reached)]


def _equal(weights: float, trained: Trained | None) -> float:
    """Return the predicted loss of inputs that comes to as much as that of the weights."""
    if trained is None or weights <= 0:
        return weights
    return trained.curves["input"].before(trained.curves["weight"].after(weights))


def _note(inputs: Found, weights: Found, trained: Trained | None, reached: bool) -> str:
    if weights.value <= 0:
        return "converge: the weights are predicted to cost nothing, so R is undefined"
    if trained is None:
        ratio, when = inputs.value / weights.value, "before training"
        where = "training repairs more of what weights cost: verify, then plan --converge again"
    else:
        ratio, when = trained.ratio(inputs.value, weights.value), "after training"
        where = f"as {trained.arms} trainings of {trained.tokens:,} tokens have it"
    if reached:
        return (
            "converge: the fewest input bits predicted to lose no more than the weights, "
            f"R = {ratio:.3f} {when}; {where}"
        )
    return (
        f"converge: cannot be reached {when}, R = {ratio:.3f} at best with these formats and "
        f"budgets; {where}; allow inputs a finer format with --formats, or more --input-bits"
    )
