"""The table of arms: which sites each quantizes, and to what."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bitplan.errors import BitplanError, PlanError
from bitplan.formats import BF16, parse_format
from bitplan.planner.plan import Plan
from bitplan.qat.arms import ARMS, RATIOS, attribution_arms, lowest, select_arms
from bitplan.sites import OPERANDS, PLANNED_ROLES, Site


@pytest.fixture
def plan(ready: Callable[..., Any]) -> Plan:
    plan: Plan = ready().plan
    return plan


def test_the_arms_are_the_ones_others_rely_on() -> None:
    assert list(ARMS) == [
        "bf16",
        "w4a16",
        "w16a4",
        "w4a4",
        "planned",
        "planned-weights",
        "planned-inputs",
    ]
    assert {name for pair in RATIOS.values() for name in pair} <= set(ARMS)


def test_each_arm_quantizes_its_operands(plan: Plan) -> None:
    low, high = parse_format("int4-g16"), parse_format("int8-g16")
    sites = {
        Site.parse(choice.site): choice.role for choice in plan.sites if choice.role != "lm_head"
    }
    planned = {site: role for site, role in sites.items() if role in PLANNED_ROLES}
    weights = {site: low for site in planned if site.operand == "weight"}
    inputs = {site: low for site in planned if site.operand == "input"}
    rule = inputs | {s: high for s, role in planned.items() if role == "fc2" and s in inputs}
    expected = {
        "bf16": {},
        "w4a16": weights,
        "w16a4": inputs,
        "w4a4": weights | inputs,
        "planned": weights | rule,
        "planned-weights": weights,
        "planned-inputs": rule,
    }
    assert {name: dict(arm.formats(plan)) for name, arm in ARMS.items()} == expected
    assert len(rule) == 14
    assert sum(fmt == high for fmt in rule.values()) == 2


def test_attribution_spares_one_role_and_operand_at_a_time(plan: Plan) -> None:
    low, high = parse_format("int4-g16"), parse_format("int8-g16")
    arms = attribution_arms(plan)
    assert list(arms) == [(role, op) for role in ("qkv", "o", "fc1", "fc2") for op in OPERANDS]
    assert arms["fc2", "input"].name == "w4a4-fc2-input-8"
    everything = ARMS["w4a4"].formats(plan)
    spared = []
    for (role, operand), arm in arms.items():
        formats = arm.formats(plan)
        assert formats.keys() == everything.keys()
        raised = {site for site, fmt in formats.items() if fmt == high}
        assert raised == {
            Site.parse(c.site) for c in plan.sites if (c.role, c.operand) == (role, operand)
        }
        assert {fmt for site, fmt in formats.items() if site not in raised} == {low}
        spared += raised
    assert sorted(map(str, spared)) == sorted(map(str, everything))
    assert attribution_arms(replace(plan, formats=("int4-g16",))) == {}


def test_a_pinned_site_is_low_in_the_uniform_arms_and_bf16_in_the_plans(plan: Plan) -> None:
    first = next(c for c in plan.sites if c.planned and c.operand == "weight")
    pinned = replace(
        plan, sites=tuple(replace(c, format=BF16) if c is first else c for c in plan.sites)
    )
    site = Site.parse(first.site)
    assert site in ARMS["w4a4"].formats(pinned)
    assert site not in ARMS["planned"].formats(pinned)


def test_the_lowest_format_fits_the_operand(plan: Plan) -> None:
    mixed = replace(
        plan,
        formats=("int8-token", "int4-channel", "int8-channel", "int6-token"),
        sites=tuple(replace(c, format=BF16) for c in plan.sites),
    )
    assert str(lowest(mixed, "weight")) == "int4-channel"
    assert str(lowest(mixed, "input")) == "int6-token"
    with pytest.raises(PlanError, match="quantizes inputs"):
        lowest(replace(mixed, formats=("int8-channel",)), "input")


def test_arms_are_selected_in_the_tables_order_and_unknown_ones_refused() -> None:
    assert [arm.name for arm in select_arms(("w4a4", "bf16"))] == ["bf16", "w4a4"]
    assert [arm.name for arm in select_arms(())] == list(ARMS)
    with pytest.raises(BitplanError, match=r"no arm w4a5: the arms are bf16, w4a16, .*inputs"):
        select_arms(("bf16", "w4a5"))
