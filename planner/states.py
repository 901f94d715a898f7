"""The knapsack with one limit, solved exactly by listing everything near the bound.

Given a price of the limit, every option has a reduced cost, and a solution's objective exceeds the
Lagrangian bound by the sum of its reduced costs plus price x what it leaves of the limit. So all
solutions within T of the bound use only options of reduced cost at most T. They are built cell by
cell as states (cost, reduced cost); states that cannot end within T, or that another state equals
or beats in cost and objective, are dropped. If any solution is found, the best one is the optimum;
otherwise T doubles. (The core idea is Pisinger's, Eur. J. Operational Research 83, 1995.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

START = 12
"""Options beyond one per cell that the first T admits."""
MOST_STATES = 400_000
EPSILON = 1e-9
"""Differences of scaled objectives and costs below this are rounding."""


@dataclass(frozen=True)
class _Stage:
    """The options of one cell: their indices, reduced costs and costs."""

    options: Ints
    reduced: Floats
    costs: Floats


def solve_by_states(
    cell: Ints, costs: Floats, reduced: Floats, limit: float, price: float
) -> Ints | None:
    """Return the best option of each cell (indices, ascending), or None where states are too many.

    cell, costs, reduced: [V], options sorted by cell; at least one solution must exist.
    """
    cells = len(np.unique(cell))
    ordered = np.sort(reduced)
    tolerance = max(float(ordered[min(cells + START, len(ordered) - 1)]), EPSILON)
    while True:
        found, fits = _within(cell, costs, reduced, limit, price, tolerance)
        if found is not None or not fits:
            return found
        if tolerance > ordered.sum() + price * limit:
            return None
        tolerance *= 2


def _within(
    cell: Ints, costs: Floats, reduced: Floats, limit: float, price: float, tolerance: float
) -> tuple[Ints | None, bool]:
    """Return the best solution within the tolerance of the bound, and whether the states fit."""
    kept = np.flatnonzero(reduced <= tolerance)
    _, start = np.unique(cell[kept], return_index=True)
    stages = [_Stage(o, reduced[o], costs[o]) for o in np.split(kept, start[1:])]
    # Cells of large spread first: what follows them then bounds the end more tightly.
    stages.sort(key=lambda stage: -float(np.ptp(stage.costs)))
    least = np.cumsum([stage.costs.min() for stage in stages][::-1])[::-1]
    most = np.cumsum([stage.costs.max() for stage in stages][::-1])[::-1]
    least, most = np.append(least[1:], 0.0), np.append(most[1:], 0.0)
    cost, above = np.zeros(1), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    for stage, min_rest, max_rest in zip(stages, least.tolist(), most.tolist(), strict=True):
        cost = (cost[:, None] + stage.costs).ravel()
        above = (above[:, None] + stage.reduced).ravel()
        unused = np.maximum(limit - cost - max_rest, 0.0)
        good = (cost + min_rest <= limit) & (above + price * unused <= tolerance)
        index = np.flatnonzero(good)
        index = index[_undominated(cost[index], above[index] - price * cost[index])]
        if len(index) == 0:
            return None, True
        if len(index) > MOST_STATES:
            return None, False
        trail.append((index // len(stage.options), stage.options[index % len(stage.options)]))
        cost, above = cost[index], above[index]
    state = int(np.argmin(above - price * cost))
    options = []
    for parents, chosen in reversed(trail):
        options.append(int(chosen[state]))
        state = int(parents[state])
    return np.sort(np.array(options)), True


def _undominated(cost: Floats, objective: Floats) -> Ints:
    """Return the states that no cheaper (or equal) one beats, by rising cost."""
    order = np.lexsort((objective, cost))
    if len(order) == 0:
        return order
    values = objective[order]
    before = np.minimum.accumulate(values)
    better = np.append(True, values[1:] < before[:-1] - EPSILON)
    kept: Ints = order[better]
    return kept
