"""The cheapest inputs that are predicted to cost no more loss than the weights: R <= 1.

Weights first, the best under their own limits; then the fewest input bits whose predicted loss is
at most that of the weights; then, at that many bits, the least loss. All three are exact.
"""

from collections.abc import Sequence

import numpy as np

from bitplan.planner.budgets import BUDGETS, Limit, objective
from bitplan.planner.problem import Ints, Problem
from bitplan.planner.search import Found, Search, best


def converge(problem: Problem, limits: Sequence[Limit]) -> tuple[Ints, float, list[str]]:
    """Return the choice [S], its optimality gap and a note with the R it reaches.

    `limits` restrain weights, inputs or neither; where R <= 1 cannot be reached under them, the
    inputs of least predicted loss are taken, at the fewest bits.
    """
    weights = best(
        problem,
        [limit for limit in limits if "input" not in limit.budget.operands],
        objective(problem, ("weight",)),
    )
    loss = objective(problem, ("input",))
    bits = BUDGETS["input_bits"].cost(problem, None)
    caps = [limit for limit in limits if limit.budget.name == "input_bits"]
    cap = min([bits.ceiling, *(limit.value for limit in caps)])
    fewest = Search(problem, bits, [loss, bits])
    found = fewest.solve([weights.value, cap])
    reached = found is not None
    if found is None:
        least = best(problem, [limit for limit in caps if np.isfinite(limit.value)], loss)
        found = fewest.solve([least.value, cap])
        assert found is not None
    final = Search(problem, loss, [bits]).solve([bits.total(problem, found.choice)])
    assert final is not None
    choice = np.where(problem.is_input, final.choice, weights.choice)
    return choice, max(weights.gap, found.gap, final.gap), [_note(final, weights, reached)]


def _note(inputs: Found, weights: Found, reached: bool) -> str:
    if weights.value <= 0:
        return "converge: the weights are predicted to cost nothing, so R is undefined"
    ratio = f"R = {inputs.value / weights.value:.3f}"
    if reached:
        return (
            f"converge: the fewest input bits predicted to lose no more than the weights, {ratio}"
        )
    return (
        f"converge: cannot be reached, {ratio} at best with these formats and budgets; "
        "allow inputs a finer format with --formats, or more --input-bits"
    )
