"""Pins: what they match, and how they are refused."""

from collections.abc import Callable
from typing import Any

import pytest

from bitplan.errors import FormatError, PlanError
from bitplan.planner.problem import UNFIXED, Problem, read_problem


def problem(tables: Callable[..., Any], *pins: str) -> Problem:
    made = tables(2)
    return read_problem(
        made.profile,
        made.errors,
        made.sensitivity,
        formats=("int4-g128", "int8-g128"),
        pins=pins,
    )


def pinned(made: Problem) -> set[str]:
    return set(made.pins)


def test_a_glob_matches_site_module_role_or_role_and_operand(tables: Callable[..., Any]) -> None:
    down = {f"model.layers.{b}.mlp.down_proj" for b in (0, 1)}
    inputs, weights = {f"{d}:input" for d in down}, {f"{d}:weight" for d in down}
    assert pinned(problem(tables, "fc2=int8-g128")) == inputs | weights
    assert pinned(problem(tables, "fc2:input=int8-g128")) == inputs
    assert pinned(problem(tables, "*.mlp.down_proj=int8-g128")) == inputs | weights
    assert pinned(problem(tables, "*down_proj:weight=int8-g128")) == weights


def test_the_later_pin_holds(tables: Callable[..., Any]) -> None:
    made = problem(tables, "fc2=int8-g128", "model.layers.1.*=int4-g128")
    assert str(made.pins["model.layers.0.mlp.down_proj:input"].format) == "int8-g128"
    assert str(made.pins["model.layers.1.mlp.down_proj:input"].format) == "int4-g128"


def test_outside_roles_count_once_they_are_pinned_to_a_quantized_format(
    tables: Callable[..., Any],
) -> None:
    head = "lm_head:weight"
    for pins, counted in (((), False), (("lm_head=bf16",), False), (("lm_head=int8-g128",), True)):
        made = problem(tables, *pins)
        index = [s.site for s in made.sites].index(head)
        assert bool(made.counted[index]) is counted
        assert made.fixed[index] != UNFIXED
    # Pinned to bf16, a site of a planned role is kept out of the plan and of every average.
    made = problem(tables, "fc2:input=bf16")
    for operand, counted in (("input", False), ("weight", True)):
        index = [s.site for s in made.sites].index(f"model.layers.0.mlp.down_proj:{operand}")
        assert bool(made.counted[index]) is counted
    with pytest.raises(PlanError, match="nothing to plan"):
        problem(tables, *(f"{role}=bf16" for role in ("qkv", "o", "fc1", "fc2")))


@pytest.mark.parametrize(
    ("pin", "said"),
    [
        ("down_pro=int8-g128", "matches no site"),
        ("model.layers.0.mlp.down_prj:input=int8-g128", r"did you mean .*down_proj:input"),
        ("zzz=int8-g128", "the roles are embed, qkv, o, fc1, fc2, lm_head"),
        ("*.q_proj=int8-g128", r"splits .*q_proj.*k_proj.*v_proj"),
        ("*up_proj:weight=int8-g128", "splits"),
        ("fc2=int8-token", "does not apply to .*down_proj:weight"),
        ("fc2", "GLOB=FORMAT"),
        ("=int8-g128", "GLOB=FORMAT"),
    ],
)
def test_refused(tables: Callable[..., Any], pin: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        problem(tables, pin)


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        (("fc2=int8-g128", "fc2=int4-g128"), "'fc2=int8-g128' has no effect: fc2=int4-g128 after"),
        (("*.0.mlp.down_proj=int8-g128", "fc2=int4-g128"), "narrower glob last"),
    ],
)
def test_pins_that_contradict_each_other_are_refused(
    tables: Callable[..., Any], pins: tuple[str, ...], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        problem(tables, *pins)
    # Said twice, or a narrower one after a wider one, is no contradiction.
    assert pinned(problem(tables, "fc2=int8-g128", "fc2:input=int8-g128", "fc2=int8-g128"))


def test_an_unknown_format_is_refused(tables: Callable[..., Any]) -> None:
    with pytest.raises(FormatError, match="int9"):
        problem(tables, "fc2=int9")
