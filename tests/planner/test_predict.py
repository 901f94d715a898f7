"""From measurements to predictions: noise, methods, missing formats."""

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.errors import PlanError
from bitplan.formats import BF16, parse_format
from bitplan.planner.predict import at_least_as_fine, best_method, denoise
from bitplan.planner.problem import read_problem

FORMATS = tuple(map(parse_format, ("int4-g128", "int4-g32", "int8-g128", "int8-token", "mxfp4")))
VALUES = st.floats(-1, 1, allow_nan=False)


def test_more_bits_or_smaller_groups_of_the_same_kind_are_finer() -> None:
    finer = at_least_as_fine([*FORMATS, BF16])
    names = [str(f) for f in [*FORMATS, BF16]]
    pairs = {(names[i], names[j]) for i, j in np.argwhere(finer) if i != j}
    assert ("int4-g128", "int4-g32") in pairs
    assert ("int4-g32", "int4-g128") not in pairs
    assert ("mxfp4", "int8-token") in pairs
    assert ("int8-token", "int8-g128") in pairs
    # Of another kind with as many bits: neither is finer.
    assert ("int4-g128", "mxfp4") not in pairs
    assert ("mxfp4", "int4-g32") not in pairs
    assert {(name, "bf16") for name in names[:-1]} <= pairs


@given(raw=st.lists(VALUES, min_size=len(FORMATS), max_size=len(FORMATS)))
def test_predictions_never_fall_below_zero_or_rise_with_bits(raw: list[float]) -> None:
    values = denoise(np.array([raw]), FORMATS)[0]
    finer = at_least_as_fine(FORMATS)
    assert (values >= 0).all()
    assert (values >= np.array(raw)).all()
    for f, g in np.argwhere(finer):
        assert values[g] <= values[f]
    # A measurement that is sound already stays as it is.
    assert denoise(values[None], FORMATS)[0].tolist() == values.tolist()


def test_measured_values_win_over_estimates(tables: Callable[..., Any]) -> None:
    made = tables(1)
    site, name = "model.layers.0.mlp.down_proj:input", "int4-g128"
    row = {"site": site, "format": name, "method": "intervention", "delta_loss": 0.5, "stderr": 0.1}
    extra = pl.DataFrame([row], schema_overrides=made.sensitivity.schema)
    both = pl.concat([made.sensitivity, extra], how="diagonal")
    for frame in (both, both.reverse()):
        found = best_method(frame).filter(site=site, format=name)
        assert found["method"].to_list() == ["intervention"]
        problem = read_problem(made.profile, made.errors, frame, formats=("int4-g128", "int8-g128"))
        index = [s.site for s in problem.sites].index(site)
        assert problem.objective[index, 0] == 0.5
        assert problem.method[index].tolist() == ["intervention", "gradient", None]


def test_a_format_that_was_not_profiled_is_told(tables: Callable[..., Any]) -> None:
    made = tables(1)
    with pytest.raises(PlanError, match=r"no sensitivity for int6-g128 .* --formats int6-g128"):
        read_problem(
            made.profile, made.errors, made.sensitivity, formats=("int4-g128", "int6-g128")
        )
    with pytest.raises(PlanError, match="no relative error for int6-g128"):
        read_problem(made.profile, made.errors, None, formats=("int4-g128", "int6-g128"))


def test_experts_that_no_token_reached_need_no_sensitivity(tables: Callable[..., Any]) -> None:
    module = "model.layers.0.mlp.down_proj"
    made = tables(1, tokens={module: 0})
    sensitivity = made.sensitivity.with_columns(
        pl.when(pl.col("site").str.starts_with(module))
        .then(None)
        .otherwise("delta_loss")
        .alias("delta_loss")
    )
    problem = read_problem(
        made.profile, made.errors, sensitivity, formats=("int4-g128", "int8-g128")
    )
    mine = [s.module == module for s in problem.sites]
    assert (problem.objective[mine] == 0).all()
    assert (problem.macs[problem.linear[mine]] == 0).all()


def test_without_sensitivity_errors_are_weighted_by_their_share(tables: Callable[..., Any]) -> None:
    made = tables(1)
    problem = read_problem(made.profile, made.errors, None, formats=("int4-g128", "int8-g128"))
    rows = made.profile.filter(pl.col("role").is_in(["qkv", "o", "fc1", "fc2"])).to_dicts()
    total = sum(r["in_features"] * r["out_features"] for r in rows if r["operand"] == "weight")
    errors = {
        (s, f): e for s, f, e in made.errors.select("site", "format", "relative_error").rows()
    }
    for row in rows:
        index = [s.site for s in problem.sites].index(row["site"])
        share = row["in_features"] * row["out_features"] / total
        worst = max(errors[row["site"], "int4-g128"], errors[row["site"], "int8-g128"])
        assert problem.objective[index, 0] == pytest.approx(share * worst)


def test_nothing_to_plan_is_told(tables: Callable[..., Any]) -> None:
    made = tables(1)
    profile = made.profile.with_columns(role=pl.lit("other"))
    with pytest.raises(PlanError, match=r"nothing to plan.* found 17 of role other"):
        read_problem(profile, made.errors, made.sensitivity, formats=("int4-g128",))
