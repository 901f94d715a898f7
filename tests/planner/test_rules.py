"""Rules: which sites they raise, and what they spend."""

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from bitplan.errors import PlanError
from bitplan.formats import Format, parse_format
from bitplan.planner.budgets import BUDGETS
from bitplan.planner.devices import DEVICES, parse_time, rate_tops
from bitplan.planner.problem import Problem, read_problem
from bitplan.planner.rules import RULES, find_rule, rules_for

FORMATS = ("int4-g128", "int8-g128")


def problem(
    tables: Callable[..., Any], *, blocks: int = 4, pins: tuple[str, ...] = (), **options: Any
) -> Problem:
    made = tables(blocks, **options)
    return read_problem(made.profile, made.errors, made.sensitivity, formats=FORMATS, pins=pins)


def raised(made: Problem, name: str) -> set[str]:
    choice = RULES[name].choice(made)
    return {
        s.site
        for s, f, counted in zip(made.sites, choice, made.counted, strict=True)
        if counted and made.formats[f].bits == 8
    }


def test_rules_raise_what_they_say(tables: Callable[..., Any]) -> None:
    made = problem(tables)
    planned = {s.site for s, counted in zip(made.sites, made.counted, strict=True) if counted}
    assert raised(made, "uniform") == set()
    assert raised(made, "uniform-8") == planned
    assert raised(made, "fc2") == {f"model.layers.{b}.mlp.down_proj:input" for b in range(4)}
    assert raised(made, "first-last") == {
        site for site in planned if ".layers.0." in site or ".layers.3." in site
    }


@pytest.mark.parametrize("name", ["kurtosis", "sqnr"])
def test_rankings_spend_at_most_what_fc2_does_and_take_the_worst_first(
    tables: Callable[..., Any], name: str
) -> None:
    made = problem(tables)
    cost = BUDGETS["input_bits"].cost(made, None)
    fc2 = cost.total(made, RULES["fc2"].choice(made))
    spent = cost.total(made, RULES[name].choice(made))
    assert spent <= fc2 * (1 + 1e-9)
    mine = raised(made, name)
    assert all(site.endswith(":input") for site in mine)
    scores = {
        s.site: s.kurtosis if name == "kurtosis" else made.relative_error[i, 0]
        for i, s in enumerate(made.sites)
        if s.operand == "input" and made.counted[i]
    }
    # What was left out and is worse than what was taken did not fit any more.
    groups: dict[str, list[int]] = {}
    for i, s in enumerate(made.sites):
        if s.site in scores:
            groups.setdefault(s.fused or s.module, []).append(i)
    smallest = min(
        float((cost.site[sites, 1] - cost.site[sites, 0]).sum())
        for sites in groups.values()
        if made.sites[sites[0]].site not in mine
    )
    assert spent + smallest > fc2 or not (set(scores) - mine)
    top = max(scores, key=lambda site: scores[site] or 0.0)
    assert top in mine
    for sites in groups.values():
        assert len({made.sites[i].site in mine for i in sites}) == 1


def test_pins_hold_within_rules(tables: Callable[..., Any]) -> None:
    made = problem(tables, pins=("model.layers.1.mlp.down_proj:input=int4-g128",))
    assert "model.layers.1.mlp.down_proj:input" not in raised(made, "fc2")
    assert "model.layers.2.mlp.down_proj:input" in raised(made, "fc2")


def test_weights_only_has_the_rules_about_weights(tables: Callable[..., Any]) -> None:
    made = problem(tables, inputs=False)
    assert {rule.name for rule in rules_for(made)} == {"uniform", "uniform-8", "first-last"}
    with pytest.raises(PlanError, match="weights only"):
        find_rule("fc2", made)


def test_an_unknown_rule_lists_those_there_are(tables: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match=r"uniform-8 .*; fc2 .*; first-last .*; kurtosis .*; sqnr"):
        find_rule("fc3", problem(tables))


def test_high_is_the_cheapest_format_of_8_bits(tables: Callable[..., Any]) -> None:
    made = tables(1, formats=("int4-g128", "int4-g32", "int8-g128", "int8-g32"))
    formats = ("bf16", "int8-g32", "int4-g32", "int8-g128", "int4-g128")
    found = read_problem(made.profile, made.errors, made.sensitivity, formats=formats)
    names = [str(found.formats[f]) for f in found.ladder("input")]
    # in_features are 64 and 160: a group of 128 has one or two scales a row.
    assert names == ["int4-g128", "int8-g128"]


def fmt(name: str) -> Format:
    return parse_format(name)


def test_a_rate_belongs_to_the_wider_operand() -> None:
    for device in DEVICES.values():
        mixed = rate_tops(device, fmt("int4-g128"), fmt("int8-token"))
        assert mixed == rate_tops(device, fmt("int8-channel"), fmt("int8-token"))
        assert rate_tops(device, fmt("int4-g128"), fmt("bf16")) == device.rates_tops["bf16"]
        for weight in ("int4-g128", "mxfp4", "fp8-e4m3", "int8-channel"):
            assert rate_tops(device, fmt(weight), fmt(weight)) >= device.rates_tops["bf16"]
    h100, a100, b200 = DEVICES["h100"], DEVICES["a100"], DEVICES["b200"]
    int4, fp4 = fmt("int4-g128"), fmt("nvfp4")
    assert rate_tops(a100, int4, int4) == 2 * a100.rates_tops["int8"]
    assert rate_tops(h100, int4, int4) == h100.rates_tops["int8"]
    assert rate_tops(b200, fp4, fp4) == 2 * b200.rates_tops["fp8"]
    assert rate_tops(a100, fp4, fp4) == a100.rates_tops["bf16"]


@pytest.mark.parametrize("text", ["H200", "H200=", "H200=x", "H200=-1", "H200=nan", "H20=3", "=3"])
def test_a_wrong_time_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--time"):
        parse_time(text)


def test_device_names_are_read_as_people_write_them() -> None:
    assert parse_time("rtx4090=3.5")[0] is parse_time("RTX 4090=3.5")[0]
    assert parse_time("h200=3.5")[1] == 3.5


def test_kurtosis_that_is_unknown_counts_as_lowest(tables: Callable[..., Any]) -> None:
    made = tables(2)
    profile = made.profile.with_columns(kurtosis=pl.lit(None, pl.Float64))
    found = read_problem(profile, made.errors, made.sensitivity, formats=FORMATS)
    assert all(site.endswith(":input") for site in raised(found, "kurtosis"))
