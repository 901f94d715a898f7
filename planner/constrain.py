"""A target's rules as constraints of the search: which pairs of formats each linear may take.

`Problem.pairs` masks the options of the joint menu, so that the optimum stays exact: the best plan
among all that the target runs. Formats that no pair of a group uses leave `allowed` as well, so
that the rules' ladder and the reasons speak of what is there.
"""

from dataclasses import replace

import numpy as np

from bitplan.errors import PlanError
from bitplan.planner.budgets import chosen
from bitplan.planner.layers import Layer
from bitplan.planner.problem import UNFIXED, Bools, Ints, Problem, SiteInfo
from bitplan.planner.search import open_pairs
from bitplan.planner.targets import Target, some


def constrain(problem: Problem, target: Target) -> Problem:
    """Return the problem with the target's pairs of formats only.

    Raises PlanError where a linear, or linears that decide together, are left without any.
    """
    infos = _linears(problem)
    masks: dict[tuple[object, ...], Bools] = {}
    for info in infos:
        key = _kind(info)
        if key not in masks:
            masks[key] = np.array(
                [
                    [target.objection(info, w, i) is None for i in problem.formats]
                    for w in problem.formats
                ]
            )
    runs = np.array([masks[_kind(info)] for info in infos])
    out = replace(problem, pairs=runs)
    open_ = open_pairs(out)
    _check(problem, target, infos, {g for g, pairs in enumerate(open_) if not pairs.any()})
    decided, possible = (
        np.stack([pairs.any(axis=2), pairs.any(axis=1)], axis=1)[
            where, problem.is_input.astype(int)
        ]
        for pairs, where in ((open_, problem.group[problem.linear]), (runs, problem.linear))
    )
    usable = np.where((problem.fixed == UNFIXED)[:, None], decided, possible)
    return replace(out, allowed=problem.allowed & usable)


def check_choice(problem: Problem, target: Target, choice: Ints, made_by: str) -> None:
    """Raise PlanError where a choice [S] that no search made is none that the target runs."""
    layers = layers_of(problem, choice)
    if found := target.objections(layers):
        raise PlanError(
            f"{target.name} cannot run the plan of {made_by}: {listed(found)}; "
            f"leave out --rule, or --target {target.name}"
        )


def layers_of(problem: Problem, choice: Ints) -> list[Layer]:
    """Return the linears with the formats of a choice [S]."""
    weights, inputs = (chosen(problem, choice, o) for o in ("weight", "input"))
    return [
        Layer(
            module=info.module,
            role=info.role,
            fused=info.fused,
            expert=info.expert,
            in_features=info.in_features,
            weight=problem.formats[weight],
            input=problem.formats[input_],
        )
        for info, weight, input_ in zip(_linears(problem), weights, inputs, strict=True)
    ]


def listed(objections: dict[str, list[str]]) -> str:
    """Say for each reason how many linears it holds for, and name a few."""
    return "; ".join(
        f"{len(modules)} linears ({some(modules)}): {reason}"
        for reason, modules in objections.items()
    )


def _linears(problem: Problem) -> list[SiteInfo]:
    """Return one site of each linear, [L]."""
    _, first = np.unique(problem.linear, return_index=True)
    return [problem.sites[i] for i in first.tolist()]


def _kind(info: SiteInfo) -> tuple[object, ...]:
    """Return what a target's rules look at, beside the formats."""
    return info.role, info.expert is not None, info.in_features


def _check(problem: Problem, target: Target, infos: list[SiteInfo], shut: set[int]) -> None:
    """Raise PlanError for groups of linears without an open pair, with a reason."""
    stuck = [i for i, group in enumerate(problem.group.tolist()) if group in shut]
    if not stuck:
        return
    held = problem.fixed[problem.linear == stuck[0]] != UNFIXED
    reasons = {
        target.objection(infos[stuck[0]], w, i): None
        for w in problem.formats[:-1]
        for i in problem.formats
    }
    why = "its pins" if held.any() else "; ".join(reason for reason in reasons if reason)
    raise PlanError(
        f"{target.name} ({target.library}) runs none of the formats at {len(stuck)} linears "
        f"({some([infos[i].module for i in stuck])}): {why}; change --formats (e.g. "
        f"{','.join(target.formats)}), or keep them out with --pin 'MODULE=bf16'"
    )
