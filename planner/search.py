"""From the problem to menus of options and back: the best choice under limits.

While every cost adds up over sites, the weights of a group of linears and its inputs are two cells,
with one option per format. A limit on bit operations or time prices the pair, and a target runs
some pairs only: then a group is one cell, with one option per pair of formats. Both are exact; the
second is larger, so it is used only where it is needed. A problem's shares limit every search.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitplan.errors import BudgetError, PlanError
from bitplan.planner.budgets import (
    Cost,
    Limit,
    chosen,
    held,
    held_columns,
    objective,
    share_cost,
    share_limit,
)
from bitplan.planner.predict import Floats
from bitplan.planner.problem import UNFIXED, Bools, Ints, Problem
from bitplan.planner.shares import Share
from bitplan.planner.solve import SLACK, Menu, Solution, solve, split

SHOWN_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice [S], what was minimized, and how far from proven optimal it is."""

    choice: Ints
    value: float
    gap: float


class Search:
    """One objective and some costs, ready to be solved for many limits."""

    def __init__(self, problem: Problem, target: Cost, costs: Sequence[Cost]) -> None:
        self._problem = problem
        costs = [*costs, *(share_cost(problem, share) for share in problem.shares)]
        self._joint = any(cost.pair is not None for cost in (target, *costs))
        self._joint |= problem.pairs is not None
        self._open = _open_cells(problem)
        self._groups = len(self._open)
        allowed = self._allowed()
        self._cell, self._option = np.nonzero(allowed)
        size = np.where(problem.is_input, problem.macs[problem.linear], 0.0)
        size += np.where(problem.is_input, 0.0, problem.params[problem.linear])
        tie = Cost(site=held(problem, np.where(problem.counted, size, 0.0)[:, None] * problem.bits))
        self._menu = Menu(
            cell=self._cell,
            objective=self._table(target)[allowed],
            costs=np.array([self._table(cost)[allowed] for cost in costs]).reshape(
                len(costs), len(self._cell)
            ),
            tie=self._table(tie)[allowed],
        )

        self._parts = [part for part in split(self._menu) if len(part[0])]
        # What no choice changes is in no part, and can still be more than its limit.
        least = _least_costs(self._menu.cell, self._menu.costs)
        free = set(range(len(costs))).difference(*(rows.tolist() for _, rows in self._parts))
        self._unchanged = {b: float(least[b]) for b in free}
        self._order = range(len(self._parts))
        self._memo: dict[tuple[float, ...], Solution | None] = {}

    def solve(self, limits: Sequence[float]) -> Found | None:
        """Return the best choice within the limits of the costs, or None where there is none."""
        limits = [*limits, *(share_limit(self._problem, share) for share in self._problem.shares)]
        if any(cost > limits[b] + SLACK * abs(cost) for b, cost in self._unchanged.items()):
            return None
        solutions = [self._part(k, [limits[b] for b in self._parts[k][1]]) for k in self._order]
        options, value, above = [], 0.0, 0.0
        for k, solution in zip(self._order, solutions, strict=True):
            if solution is None:
                return None
            options.append(self._parts[k][0][solution.options])
            value += solution.value
            above += solution.gap * abs(solution.value)
        choice = self._choice(np.sort(np.concatenate(options)))
        return Found(choice=choice, value=value, gap=above / abs(value) if above else 0.0)

    def _part(self, k: int, limits: Sequence[float]) -> Solution | None:
        """Solve one of the parts that share no limit, once for the same limits."""
        key = (k, *limits)
        if key not in self._memo:
            index, rows = self._parts[k]
            elsewhere = np.ones(len(self._menu.cell), dtype=bool)
            elsewhere[index] = False
            # What pinned cells of other parts use of these limits, as a first cell of one option.
            used = _least_costs(
                self._menu.cell[elsewhere], self._menu.costs[np.ix_(rows, elsewhere)]
            )
            menu = Menu(
                cell=np.append(-1, self._menu.cell[index]),
                objective=np.append(0.0, self._menu.objective[index]),
                costs=np.column_stack([used, self._menu.costs[np.ix_(rows, index)]]),
                tie=np.append(0.0, self._menu.tie[index]),
            )
            found = solve(menu, np.array(limits, dtype=float))
            self._memo[key] = found and replace(found, options=found.options[1:] - 1)
        return self._memo[key]

    def _allowed(self) -> Bools:
        """Return [cell, option]; a cell without a site to decide keeps its first option."""
        if not self._joint:
            return self._open.reshape(2 * self._groups, -1)
        return open_pairs(self._problem).reshape(self._groups, -1)

    def _table(self, cost: Cost) -> Floats:
        """Add a cost up to [cell, option]."""
        p, formats = self._problem, len(self._problem.formats)
        parts = np.zeros((self._groups, 2, formats))
        np.add.at(parts, (p.group[p.linear], p.is_input.astype(int)), cost.site)
        if not self._joint:
            return parts.reshape(2 * self._groups, formats)
        table = parts[:, 0, :, None] + parts[:, 1, None, :]
        if cost.pair is not None:
            np.add.at(table, p.group, cost.pair)
        return table.reshape(self._groups, formats * formats)

    def _choice(self, options: Ints) -> Ints:
        """Read the format of every site off the chosen option of its cell."""
        p, formats = self._problem, len(self._problem.formats)
        option = self._option[options]
        if self._joint:
            picked = np.stack([option // formats, option % formats], axis=1)
        else:
            picked = option.reshape(self._groups, 2)
        mine = picked[p.group[p.linear], p.is_input.astype(int)]
        return np.where(p.fixed == UNFIXED, mine, p.fixed)


def _least_costs(cell: Ints, costs: Floats) -> Floats:
    """Return the sum over cells of the least cost of each, [B]; costs: [B, V], cells ascending."""
    if len(cell) == 0:
        return np.zeros(len(costs))
    _, start = np.unique(cell, return_index=True)
    total: Floats = np.minimum.reduceat(costs, start, axis=1).sum(axis=1)
    return total


def _open_cells(problem: Problem) -> Bools:
    """Return [group, operand, F]: the formats that all sites to decide of a group allow.

    Where a group has no site to decide (all fixed, or none), the first column stands for it.
    """
    groups, formats = int(problem.group.max()) + 1, len(problem.formats)
    undecided = problem.fixed == UNFIXED
    where = (problem.group[problem.linear[undecided]], problem.is_input[undecided].astype(int))
    out = np.ones((groups, 2, formats), dtype=bool)
    np.logical_and.at(out, where, problem.allowed[undecided])
    decides = np.zeros((groups, 2), dtype=bool)
    decides[where] = True
    out[~decides] = np.arange(formats) == 0
    return out


def open_pairs(problem: Problem) -> Bools:
    """Return [group, F, F]: the (weight, input) formats that a group may take together."""
    cells = _open_cells(problem)
    out: Bools = cells[:, 0, :, None] & cells[:, 1, None, :]
    if problem.pairs is not None:
        weight, input_ = (held_columns(problem, o) for o in ("weight", "input"))
        linear = np.arange(len(problem.group))[:, None, None]
        runs = problem.pairs[linear, weight[:, :, None], input_[:, None, :]]
        np.logical_and.at(out, problem.group, runs)
    return out


def open_beside(problem: Problem, choice: Ints) -> Bools:
    """Return [group, operand, F]: what a group may take while its other operand stays as chosen."""
    out = _open_cells(problem)
    if problem.pairs is not None:
        weight, input_ = (chosen(problem, choice, o) for o in ("weight", "input"))
        linear = np.arange(len(problem.group))
        runs = np.stack([problem.pairs[linear, :, input_], problem.pairs[linear, weight]], axis=1)
        np.logical_and.at(out, problem.group, runs)
    return out


def runs(problem: Problem, choice: Ints) -> bool:
    """Whether the problem's target, if there is one, runs every linear as chosen."""
    if problem.pairs is None:
        return True
    weight, input_ = (chosen(problem, choice, o) for o in ("weight", "input"))
    return bool(problem.pairs[np.arange(len(weight)), weight, input_].all())


def best(problem: Problem, limits: Sequence[Limit], target: Cost | None = None) -> Found:
    """Return the choice of least predicted loss (or `target`) within the limits.

    Raises BudgetError where no choice keeps to them, with the smallest values that one does, and
    PlanError where none keeps to the shares.
    """
    costs = [limit.cost(problem) for limit in limits]
    target = target or objective(problem)
    found = Search(problem, target, costs).solve([limit.value for limit in limits])
    if found is None:
        raise _too_small(problem, limits, costs)
    return found


def _too_small(problem: Problem, limits: Sequence[Limit], costs: Sequence[Cost]) -> PlanError:
    """Say what cannot be met, and the nearest that can: the smallest limits that hold together."""
    if clash := _clashing_shares(problem):
        return clash
    alone = [_least(replace(problem, shares={}), cost) for cost in costs]
    # What can be met alone is kept, so that what cannot is raised by as much as it needs.
    order = sorted(range(len(limits)), key=lambda i: _beyond(alone[i], limits[i]))
    met: dict[int, float] = {}
    raised: dict[int, str] = {}
    for i in order:
        found = Search(problem, costs[i], [costs[j] for j in met]).solve(list(met.values()))
        assert found is not None
        met[i] = limits[i].value
        if _beyond(found.value, limits[i]):
            raised[i] = round_up(found.value)
            met[i] = float(raised[i])
            smallest = found.value
    first = next(iter(raised))
    if len(raised) == 1:
        others = {str(limits[j]): (costs[j], met[j]) for j in met if j != first}
        kept = _in_the_way(problem, costs[first], others, smallest)
        clashes = kept and smallest > alone[first] * (1 + SLACK)
        return BudgetError(
            f"no plan meets {limits[first]}{' beside ' + ', '.join(kept) if clashes else ''}: the "
            f"smallest that can be met is {raised[first]} {limits[first].budget.unit}; raise it, "
            "or allow smaller --formats",
            smallest=smallest,
        )
    asked = " and ".join(str(limits[i]) for i in raised)
    nearest = " and ".join(f"{limits[i].budget.name} <= {text}" for i, text in raised.items())
    return BudgetError(
        f"no plan meets {asked}: the smallest that can be met together is {nearest}; raise them, "
        "or allow smaller --formats",
        smallest=float(raised[first]),
    )


def _in_the_way(
    problem: Problem, cost: Cost, others: Mapping[str, tuple[Cost, float]], smallest: float
) -> list[str]:
    """Name the limits and shares without which a cost could be smaller; all, if no one alone is."""
    shares = {_option(share): share for share in problem.shares}
    named = []
    for name in (*others, *shares):
        left = [limit for other, limit in others.items() if other != name]
        fewer = {s: sites for s, sites in problem.shares.items() if s is not shares.get(name)}
        search = Search(replace(problem, shares=fewer), cost, [each for each, _ in left])
        found = search.solve([value for _, value in left])
        assert found is not None
        if found.value < smallest * (1 - SLACK):
            named.append(name)
    return named or [*others, *shares]


def _beyond(value: float, limit: Limit) -> bool:
    return value > limit.value * (1 + SLACK)


def _least(problem: Problem, cost: Cost) -> float:
    """Return the smallest value of a cost that a choice within the shares has."""
    found = Search(problem, cost, []).solve([])
    assert found is not None
    return found.value


def _clashing_shares(problem: Problem) -> PlanError | None:
    """Return the error for the first share that pins or the shares before it rule out, or None."""
    before: dict[Share, Sequence[int]] = {}
    for share, sites in problem.shares.items():
        one = replace(problem, shares={share: sites})
        against = _least(replace(problem, shares=before), share_cost(one, share))
        if against > share.limit + SLACK:
            beside = f" beside {', '.join(map(_option, before))}" if before else ""
            word, nearest = ("smallest", against) if share.is_most else ("largest", 1 - against)
            return PlanError(
                f"{_option(share)} cannot be met{beside}: with the pins and the linears that "
                f"decide together, the {word} share that can is {nearest:.4g}"
            )
        before[share] = sites
    return None


def _option(share: Share) -> str:
    return f"--share {str(share)!r}"


def round_up(value: float) -> str:
    """Return a decimal no smaller than `value`, so that what a message says can be typed."""
    text = f"{value:.{SHOWN_DIGITS}g}"
    if float(text) < value:
        step = 10.0 ** (np.floor(np.log10(value)) - SHOWN_DIGITS + 1)
        text = f"{float(text) + step:.{SHOWN_DIGITS}g}"
    return text
