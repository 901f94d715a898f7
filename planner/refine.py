"""Refining a plan by what it costs whole: which changes to measure, and the problem around it.

Losses of sites do not add up exactly. Around a plan that was measured whole, the change of loss of
a single decision, measured in its place with all other sites quantized, contains its interactions
with all of them. Those near the decision are worth measuring: the moves of swaps that are predicted
to cost the least, all limits kept. `around` puts what was measured in the place of what was
predicted, and the exact search does the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitplan.planner.budgets import Limit
from bitplan.planner.predict import Floats
from bitplan.planner.problem import UNFIXED, Bools, Ints, Problem
from bitplan.planner.solve import SLACK


@dataclass(frozen=True)
class Move:
    """Another format for one decision: the weights, or the inputs, of a group of linears."""

    group: int
    is_input: bool
    format: int


def moved(problem: Problem, choice: Ints, move: Move) -> Ints:
    """Return the choice [S] after a move."""
    return np.where(_members(problem, move), move.format, choice)


def near_moves(
    problem: Problem, choice: Ints, limits: Sequence[Limit], count: int
) -> tuple[Move, ...]:
    """Return up to `count` moves, first those of the swaps that are predicted to cost the least.

    A swap is a move that costs loss and one that saves it, of two decisions; or the latter alone
    where the limits leave room.
    """
    moves = list(_moves(problem, choice))
    if not moves:
        return ()
    costs = [limit.cost(problem) for limit in limits]
    room = np.array(
        [limit.value - c.total(problem, choice) for limit, c in zip(limits, costs, strict=True)]
    )
    tolerance = SLACK * np.array([abs(limit.value) for limit in limits])
    after = [moved(problem, choice, move) for move in moves]
    loss = np.array([_loss(problem, one) for one in after]) - _loss(problem, choice)
    used = np.array([[c.total(problem, one) for c in costs] for one in after])
    used = (used - np.array([c.total(problem, choice) for c in costs])).reshape(len(moves), -1)
    cell = np.array([2 * move.group + move.is_input for move in moves])
    saving = np.flatnonzero(loss <= 0)
    closeness = np.full(len(moves), np.inf)
    alone = (used[saving] <= room + tolerance).all(axis=1)
    closeness[saving[alone]] = loss[saving[alone]]
    for i in np.flatnonzero(loss > 0).tolist():
        fits = (used[saving] + used[i] <= room + tolerance).all(axis=1)
        fits &= cell[saving] != cell[i]
        partners = saving[fits]
        cost = loss[partners] + loss[i]
        closeness[i] = cost.min(initial=np.inf)
        closeness[partners] = np.minimum(closeness[partners], cost)
    order = np.argsort(closeness, kind="stable")[:count]
    return tuple(moves[i] for i in order.tolist() if np.isfinite(closeness[i]))


def around(problem: Problem, choice: Ints, found: Mapping[Move, float]) -> Problem:
    """Return the problem whose objective is the change from a choice [S], known for some moves.

    A decision's changes are raised by what the best of them saves: no objective is below zero.
    """
    rows = np.arange(len(problem.sites))
    objective = problem.objective - problem.objective[rows, choice][:, None]
    for move, change in found.items():
        members = _members(problem, move)
        objective[members, move.format] = change / members.sum()
    cell = 2 * problem.group[problem.linear] + problem.is_input
    total = np.zeros((int(cell.max()) + 1, objective.shape[1]))
    undecided = problem.fixed == UNFIXED
    open_ = problem.allowed & undecided[:, None]
    np.add.at(total, cell, np.where(open_, objective, 0.0))
    sites = np.bincount(cell, undecided)
    lowest = total.min(axis=1) / np.maximum(sites, 1)
    return replace(problem, objective=np.where(open_, objective - lowest[cell][:, None], 0.0))


def stderr_of(problem: Problem, choice: Ints) -> float:
    """Return the standard error of a choice's predicted loss, nats per token.

    Readers of one input share its error, which adds up; others are taken as independent.
    """
    site = np.nan_to_num(problem.predicted_stderr[np.arange(len(choice)), choice])
    shared = np.bincount(problem.group[problem.linear], np.where(problem.is_input, site, 0.0))
    return float(np.sqrt((shared**2).sum() + (site[~problem.is_input] ** 2).sum()))


def kl_of(problem: Problem, choice: Ints) -> float | None:
    """Return the sum of a choice's KL divergences, None where a site's is not known."""
    site = problem.kl[np.arange(len(choice)), choice][problem.counted]
    return None if np.isnan(site).any() else float(site.sum())


def _moves(problem: Problem, choice: Ints) -> Iterator[Move]:
    undecided = problem.fixed == UNFIXED
    where = np.stack([problem.group[problem.linear], problem.is_input], axis=1)
    for group, is_input in np.unique(where[undecided], axis=0).tolist():
        members = undecided & (where == (group, is_input)).all(axis=1)
        formats = problem.allowed[members].all(axis=0)
        now = choice[members][0]
        for format_ in np.flatnonzero(formats).tolist():
            if format_ != now:
                yield Move(group, bool(is_input), format_)


def _members(problem: Problem, move: Move) -> Bools:
    """Return [S]: the sites that a move changes."""
    mine: Bools = (
        (problem.group[problem.linear] == move.group)
        & (problem.is_input == move.is_input)
        & (problem.fixed == UNFIXED)
    )
    return mine


def _loss(problem: Problem, choice: Ints) -> float:
    table: Floats = problem.objective
    return float(table[np.arange(len(choice)), choice].sum())
