"""The multiple-choice knapsack, solved to proven optimality.

One option of every cell, least total objective, every cost within its limit. Cells that share no
limit are solved apart (`split`). Small instances go to HiGHS whole. It proves large ones slowly,
so it is given a core of them: the linear relaxation yields prices of the limits; with any prices,
the Lagrangian bounds the optimum from below, and the *reduced cost* of an option says how
far above that bound every solution that uses it must lie. HiGHS solves over the options of small
reduced cost; if what it finds lies no further above the bound than the smallest reduced cost left
out, nothing left out can be better, and the optimum is proven. Otherwise how far it lies above the
bound is the reduced cost up to which the next core must reach, and that one proves it. With one
limit, states.py lists all solutions that near to the bound itself, which is faster.

Ties: an option that another one of its cell equals or beats in objective, costs and tie-break
(fewer bits) is dropped first. HiGHS is deterministic.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from bitplan.errors import PlanError
from bitplan.planner.quiet import quiet_stdout
from bitplan.planner.states import solve_by_states

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SLACK = 1e-9
"""Relative: a limit is met up to rounding."""
PROVEN = 1e-9
"""Relative: a smaller gap is the solver's rounding."""
CORE = 100
"""Options beyond one per cell in the first core."""
GROWTH = 4
SMALL = 600
"""Instances with at most this many options are their own core."""
TIME_LIMIT_S = 120.0
OBJECTIVE_SCALE = 1e3
INFEASIBLE = 2
HIGHEST_PRICE = 1e15
BISECTIONS = 50
ROUNDING = 1e-7
"""Relative: room for the solver's tolerances around a value that a solution has."""


@dataclass(frozen=True, kw_only=True)
class Menu:
    """Options: `cell` [V], ascending; `objective` [V]; `costs` [B, V]; `tie` [V]."""

    cell: Ints
    objective: Floats
    costs: Floats
    tie: Floats


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The chosen option of each cell (indices into the menu), and how far from proven it is."""

    options: Ints
    value: float
    gap: float
    """(value - lower bound) / value; 0 when proven."""


@dataclass(frozen=True)
class _Scaled:
    """An instance with at least two options per cell, everything counted above the cell's least."""

    cell: Ints
    objective: Floats
    costs: Floats
    limits: Floats

    @property
    def choose_one(self) -> csr_array:
        """One row per cell: its options sum to 1."""
        count = len(self.cell)
        _, row = np.unique(self.cell, return_inverse=True)
        shape = (int(row.max()) + 1, count)
        return csr_array((np.ones(count), (row, np.arange(count))), shape=shape)

    def take(self, keep: Bools) -> "_Scaled":
        """Return the instance with some of the options only."""
        return _Scaled(self.cell[keep], self.objective[keep], self.costs[:, keep], self.limits)


def split(menu: Menu) -> list[tuple[Ints, Ints]]:
    """Return the parts of a menu that share no limit: their options [V'] and limits [B'].

    Of limits on proportional costs only one would be needed; they stay in one part.
    """
    cells, start, of = np.unique(menu.cell, return_index=True, return_inverse=True)
    spread = np.maximum.reduceat(menu.costs, start, axis=1)
    spread -= np.minimum.reduceat(menu.costs, start, axis=1)
    touches = spread > 0
    part = np.arange(len(touches))
    for b, c in zip(*np.triu_indices(len(touches), 1), strict=True):
        if (touches[b] & touches[c]).any():
            part[part == part[c]] = part[b]
    # A cell that no limit touches joins the first part; one that does, the part of its limits.
    home = np.array([part[b] for b in touches.argmax(axis=0)]) if len(part) else cells * 0
    kinds = np.unique(np.append(part, home))
    return [(np.flatnonzero(home[of] == k), np.flatnonzero(part == k)) for k in kinds]


def solve(menu: Menu, limits: Floats) -> Solution | None:
    """Return the best solution within the limits [B], or None where there is none."""
    room = limits * (1 + SLACK)
    margin = np.zeros_like(room)
    for _ in range(4):
        solution = _solve(menu, room - margin)
        if solution is None:
            return None
        over = menu.costs[:, solution.options].sum(axis=1) - limits * (1 + 2 * SLACK)
        if (over <= 0).all():
            return solution
        # HiGHS lets a row exceed its bound by a tolerance; ask again for that much less.
        margin += 2 * np.maximum(over, 0)
    raise PlanError("the solver cannot keep to the budget; raise it a little")


def _solve(menu: Menu, limits: Floats) -> Solution | None:
    cells, start = np.unique(menu.cell, return_index=True)
    least_cost = np.minimum.reduceat(menu.costs, start, axis=1)
    room = limits - least_cost.sum(axis=1)
    if (room < 0).any():
        return None
    of = np.searchsorted(cells, menu.cell)
    costs = menu.costs - least_cost[:, of]
    keep = (costs <= room[:, None]).all(axis=0)
    if len(np.unique(menu.cell[keep])) < len(cells):
        return None
    keep[keep] = ~dominated(menu.cell[keep], menu.objective[keep], costs[:, keep], menu.tie[keep])
    index = np.flatnonzero(keep)
    single = np.bincount(of[index], minlength=len(cells))[of[index]] == 1
    room -= costs[:, index[single]].sum(axis=1)
    if (room < -SLACK * np.abs(limits)).any():
        return None
    open_ = index[~single]
    chosen, gap = index[single], 0.0
    if len(open_):
        scaled, unit = _scale(menu.cell[open_], menu.objective[open_], costs[:, open_], room)
        scaled = _tightest(scaled)
        found = _search(scaled)
        if found is None:
            return None
        picked, above = found
        chosen = np.sort(np.concatenate([chosen, open_[picked]]))
        gap = above * unit
    value = float(menu.objective[chosen].sum())
    gap = gap / abs(value) if value else 0.0
    return Solution(options=chosen, value=value, gap=gap if gap > PROVEN else 0.0)


def dominated(cell: Ints, objective: Floats, costs: Floats, tie: Floats) -> Bools:
    """Return [V]: whether another option of the cell is as good in all respects and comes first.

    The order among equals is that of the tie-break, then that of the menu.
    """
    order = np.lexsort((np.arange(len(cell)), tie, objective, cell))
    scores = np.vstack([objective, tie, costs])[:, order]
    sorted_cell = cell[order]
    out = np.zeros(len(cell), dtype=bool)
    largest = int(np.bincount(np.unique(cell, return_inverse=True)[1]).max())
    for step in range(1, largest):
        same = sorted_cell[step:] == sorted_cell[:-step]
        out[step:] |= same & (scores[:, :-step] <= scores[:, step:]).all(axis=0)
    result = np.empty_like(out)
    result[order] = out
    return result


def _scale(cell: Ints, objective: Floats, costs: Floats, room: Floats) -> tuple[_Scaled, float]:
    """Bring objective and costs to the range that HiGHS's absolute tolerances are made for."""
    _, start, of = np.unique(cell, return_index=True, return_inverse=True)
    objective = objective - np.minimum.reduceat(objective, start)[of]
    unit = float(objective.max()) / OBJECTIVE_SCALE or 1.0
    largest = costs.max(axis=1)
    largest[largest == 0] = 1.0
    room = np.maximum(room, 0.0)
    return _Scaled(cell, objective / unit, costs / largest[:, None], room / largest), unit


def _tightest(problem: _Scaled) -> _Scaled:
    """Drop limits on costs that are proportional to another one's and no tighter."""
    rows: list[int] = []
    for b in np.argsort(problem.limits, kind="stable").tolist():
        same = [np.allclose(problem.costs[b], problem.costs[r], rtol=0, atol=1e-12) for r in rows]
        if not any(same) and problem.costs[b].any():
            rows.append(b)
    return _Scaled(problem.cell, problem.objective, problem.costs[rows], problem.limits[rows])


def _search(problem: _Scaled) -> tuple[Ints, float] | None:
    """Return the chosen options, one per cell, and the unproven part of the objective."""
    count = len(problem.cell)
    if len(problem.limits) == 0:
        order = np.lexsort((np.arange(count), problem.objective, problem.cell))
        return order[np.unique(problem.cell[order], return_index=True)[1]], 0.0
    if len(problem.limits) > 1 and count <= SMALL:
        found = _milp(problem)
        return None if found is None else (found[0], found[2])
    if len(problem.limits) == 1:
        reduced, price = _price(problem)
        limit = float(problem.limits[0])
        options = solve_by_states(problem.cell, problem.costs[0], reduced, limit, price)
        if options is not None:
            return options, 0.0
    relaxed = _relax(problem)
    return None if relaxed is None else _by_core(problem, *relaxed)


def _by_core(
    problem: _Scaled, reduced: Floats, bound: float, prices: Floats
) -> tuple[Ints, float] | None:
    """Return what `_search` returns: a core that contains a solution tells the one to prove it."""
    count, cells = len(problem.cell), len(np.unique(problem.cell))
    sizes, size = np.sort(reduced), cells + CORE
    while True:
        threshold = float(sizes[size - 1]) if size < count else np.inf
        keep = reduced <= threshold
        found = _milp(problem.take(keep))
        if found is not None and found[1] - bound <= threshold:
            return np.flatnonzero(keep)[found[0]], found[2]
        if found is not None:
            break
        if size >= count:
            return None
        size = min(count, cells + GROWTH * (size - cells))
    above = (found[1] - bound) * (1 + ROUNDING)
    keep = reduced <= above
    core = problem.take(keep)
    # Nothing better uses more reduced cost in all, or leaves more of a limit than its price pays.
    least = core.limits - above / np.maximum(prices, ROUNDING)
    core = replace(
        core,
        costs=np.vstack([core.costs, reduced[keep]]),
        limits=np.append(core.limits, above),
    )
    proven = _milp(core, np.append(least, -np.inf))
    assert proven is not None, "the solution of the smaller core is one of the larger"
    return np.flatnonzero(keep)[proven[0]], proven[2]


def _price(problem: _Scaled) -> tuple[Floats, float]:
    """Return the reduced costs [V] at the price of the one limit, and that price.

    The price is the least at which the best options, cell by cell, keep to the limit: by bisection,
    as what they cost falls with the price. Any price would do; this one gives the best bound.
    """
    costs, limit = problem.costs[0], float(problem.limits[0])
    _, start, of = np.unique(problem.cell, return_index=True, return_inverse=True)

    def reduced(price: float) -> Floats:
        priced = problem.objective + price * costs
        difference: Floats = priced - np.minimum.reduceat(priced, start)[of]
        return difference

    def fits(price: float) -> bool:
        best = np.where(reduced(price) <= 0, costs, np.inf)
        return float(np.minimum.reduceat(best, start).sum()) <= limit

    low, high = 0.0, 1.0
    while not fits(high) and high < HIGHEST_PRICE:
        low, high = high, 4 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return reduced(high), high


def _relax(problem: _Scaled) -> tuple[Floats, float, Floats] | None:
    """Return the reduced costs [V], the Lagrangian bound, and the relaxation's prices [B]."""
    # Sparse, which the type stubs of linprog do not know.
    choose: Any = problem.choose_one
    result = linprog(
        problem.objective,
        A_ub=problem.costs,
        b_ub=problem.limits,
        A_eq=choose,
        b_eq=np.ones(choose.shape[0]),
        bounds=(0, 1),
        method="highs-ds",
    )
    if result.status == INFEASIBLE:
        return None
    if result.status != 0:
        raise PlanError(f"the solver failed on the relaxation: {result.message}")
    # Any prices that are not negative give a valid bound, whatever the solver's accuracy.
    prices = np.maximum(-result.ineqlin.marginals, 0.0)
    priced = problem.objective + prices @ problem.costs
    _, start, of = np.unique(problem.cell, return_index=True, return_inverse=True)
    least = np.minimum.reduceat(priced, start)
    return priced - least[of], float(least.sum() - prices @ problem.limits), prices


def _milp(problem: _Scaled, least: Floats | float = -np.inf) -> tuple[Ints, float, float] | None:
    """Return HiGHS's options, their objective, and how far it is from HiGHS's bound.

    `least` [B]: what is known of how much of each limit the optimum uses.
    """
    count = len(problem.cell)
    constraints = [LinearConstraint(problem.choose_one, 1, 1)]
    if len(problem.limits):
        constraints.append(LinearConstraint(problem.costs, least, problem.limits))
    with quiet_stdout():
        result = milp(
            problem.objective,
            integrality=np.ones(count, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
        )
    if result.status == INFEASIBLE:
        return None
    if result.x is None:
        raise PlanError(f"the solver found no plan in {TIME_LIMIT_S:.0f} s: {result.message}")
    _, start = np.unique(problem.cell, return_index=True)
    ends = np.append(start[1:], count)
    options = np.array([a + int(result.x[a:b].argmax()) for a, b in zip(start, ends, strict=True)])
    value = float(problem.objective[options].sum())
    return options, value, max(0.0, value - float(result.mip_dual_bound))
