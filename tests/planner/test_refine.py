"""Refinement against enumeration: which moves are near, and the best plan around a measured one."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bitplan.planner.budgets import BUDGETS, Limit
from bitplan.planner.problem import UNFIXED, Ints, Problem, read_problem
from bitplan.planner.refine import Move, around, kl_of, moved, near_moves, stderr_of
from bitplan.planner.search import best

FORMATS = ("int4-g128", "int8-g128")


@pytest.fixture
def problem(tables: Callable[..., Any]) -> Problem:
    made = tables(2, keep=("o_proj", "gate_proj", "up_proj", "down_proj"), seed=3)
    return read_problem(made.profile, made.errors, made.sensitivity, formats=FORMATS)


def input_limit(problem: Problem, bits: float) -> list[Limit]:
    cost = BUDGETS["weight_bits"].cost(problem, None)
    four = cost.total(problem, np.where(problem.fixed == UNFIXED, 0, problem.fixed))
    return [
        Limit(budget=BUDGETS["input_bits"], value=bits),
        Limit(budget=BUDGETS["weight_bits"], value=four),
    ]


def every_choice(problem: Problem) -> Iterator[Ints]:
    """Yield all choices that a group decides alike."""
    undecided = problem.fixed == UNFIXED
    cells = [
        (undecided & (problem.group[problem.linear] == group) & (problem.is_input == is_input))
        for group in range(int(problem.group.max()) + 1)
        for is_input in (False, True)
    ]
    cells = [cell for cell in cells if cell.any()]
    for formats in itertools.product(range(len(FORMATS)), repeat=len(cells)):
        choice = problem.fixed.copy()
        for cell, f in zip(cells, formats, strict=True):
            choice[cell] = f
        yield choice


def fits(problem: Problem, choice: Ints, limits: list[Limit]) -> bool:
    return all(x.cost(problem).total(problem, choice) <= x.value * (1 + 1e-9) for x in limits)


def loss(problem: Problem, choice: Ints) -> float:
    return float(problem.objective[np.arange(len(choice)), choice].sum())


def test_near_moves_are_those_of_the_cheapest_swaps(problem: Problem) -> None:
    limits = input_limit(problem, 5.5)
    choice = best(problem, limits).choice
    moves = near_moves(problem, choice, limits, 100)
    allowed = [one for one in every_choice(problem) if fits(problem, one, limits)]
    groups = problem.group[problem.linear]

    def decisions(one: Ints) -> set[tuple[int, bool, int]]:
        changed = np.flatnonzero(one != choice)
        return {(int(groups[i]), bool(problem.is_input[i]), int(one[i])) for i in changed}

    cost: dict[tuple[int, bool, int], float] = {}
    for one in allowed:
        changes, more = decisions(one), loss(problem, one) - loss(problem, choice)
        if len(changes) == 2:
            signs = [
                loss(problem, moved(problem, choice, Move(*c))) > loss(problem, choice)
                for c in changes
            ]
            if sum(signs) == 1:
                for c in changes:
                    cost[c] = min(cost.get(c, np.inf), more)
    found = [(m.group, m.is_input, m.format) for m in moves]
    assert set(found) == set(cost)
    assert [cost[m] for m in found] == pytest.approx(sorted(cost.values()))
    assert near_moves(problem, choice, limits, 3) == moves[:3]
    # No budget for anything else, and nothing left to save: no move.
    everything = input_limit(problem, 99.0)
    assert not near_moves(problem, best(problem, everything).choice, everything, 9)


def test_the_best_around_a_plan_is_that_of_an_enumeration(problem: Problem) -> None:
    limits = input_limit(problem, 5.5)
    choice = best(problem, limits).choice
    moves = near_moves(problem, choice, limits, 6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = {move: float(rng.normal()) * 1e-3 for move in moves}

        def change(one: Ints, found: dict[Move, float] = found) -> float:
            total = 0.0
            seen = set()
            for i in np.flatnonzero(one != choice).tolist():
                move = Move(
                    int(problem.group[problem.linear[i]]), bool(problem.is_input[i]), int(one[i])
                )
                if move not in found:
                    total += problem.objective[i, one[i]] - problem.objective[i, choice[i]]
                elif move not in seen:
                    total += found[move]
                    seen.add(move)
            return float(total)

        allowed = [one for one in every_choice(problem) if fits(problem, one, limits)]
        answer = best(around(problem, choice, found), limits).choice
        assert fits(problem, answer, limits)
        assert change(answer) == pytest.approx(min(map(change, allowed)), abs=1e-12)


def test_standard_errors_of_one_input_add_up(problem: Problem) -> None:
    choice = np.where(problem.fixed == UNFIXED, 0, problem.fixed)
    by_input: dict[int, float] = {}
    squares = 0.0
    for i, f in enumerate(choice.tolist()):
        one = float(problem.predicted_stderr[i, f])
        if problem.is_input[i]:
            group = int(problem.group[problem.linear[i]])
            by_input[group] = by_input.get(group, 0.0) + one
        else:
            squares += one**2
    squares += sum(one**2 for one in by_input.values())
    assert stderr_of(problem, choice) == pytest.approx(squares**0.5)
    assert kl_of(problem, choice) is None  # these tables have none
