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
from bitplan.planner.predict import (
    Prediction,
    at_least_as_fine,
    best_method,
    denoise,
    predict,
)
from bitplan.planner.problem import read_problem
from bitplan.tables import SENSITIVITY

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


COLUMNS = ("int4-g128", "bf16")


def sensitivities(method: str, **columns: Any) -> pl.DataFrame:
    """Return rows of one method at int4-g128, for the weights of as many sites as values."""
    count = len(next(iter(columns.values())))
    rows = [
        {"site": f"m.{i}:weight", "format": COLUMNS[0], "method": method}
        | {name: float(values[i]) for name, values in columns.items()}
        for i in range(count)
    ]
    return SENSITIVITY.frame(rows)


def predicted(sensitivity: pl.DataFrame, count: int) -> Prediction:
    sites = [f"m.{i}:weight" for i in range(count)]
    is_input = np.zeros(count, dtype=bool)
    return predict(sensitivity, sites, is_input, tuple(map(parse_format, COLUMNS)))


def test_noise_is_shrunk_and_what_stands_out_is_kept() -> None:
    rng = np.random.default_rng(0)
    kl = 10 ** rng.uniform(-4, -2, 2000)
    for rho in (0.0, 0.2, 2.0):
        truth = rho * kl * rng.normal(size=len(kl))
        s = 10 ** rng.uniform(-4, -2.5, len(kl))
        first = truth + s * rng.normal(size=len(kl))
        frame = sensitivities("gradient", delta_loss=kl + first, stderr=s, kl=kl, kl_stderr=0 * kl)
        found = predicted(frame, len(kl)).loss[:, 0]
        best = kl + (rho * kl) ** 2 / ((rho * kl) ** 2 + s**2) * first
        error = np.square(found - kl - truth).mean()
        assert error < 1.05 * np.square(best - kl - truth).mean() + 1e-9
        assert error < 0.9 * np.square(first - truth).mean()
        # Never beyond what was estimated, nor on the other side of kl.
        assert (np.abs(found - kl) <= np.abs(first) + 1e-15).all()
        assert ((found - kl) * first >= 0).all()


def test_interventions_rescale_what_is_not_measured() -> None:
    kl = np.array([1e-3, 2e-3, 4e-3, 8e-3, 1e-2])
    exact = {"stderr": 0 * kl, "kl_stderr": 0 * kl}
    estimated = sensitivities("gradient", delta_loss=kl, kl=kl, **exact)
    ratios = np.array([1.2, 1.5, 1.6])
    for count, ratio in ((2, 1.0), (3, 1.5)):
        some = ratios[:count] * kl[:count]
        none = {name: values[:count] for name, values in exact.items()}
        measured = sensitivities("intervention", delta_loss=some, kl=some, **none)
        found = predicted(pl.concat([estimated, measured]), len(kl))
        assert found.loss[:, 0] == pytest.approx([*some, *(ratio * kl[count:])])
        assert found.kl[:, 0] == pytest.approx([*some, *(ratio * kl[count:])])
        assert any("multiplied by 1.5" in note for note in found.notes) == (count == 3)
    # The ratios' spread is the estimates' own error: 1.4826 times the median of 0.3, 0 and 0.1.
    assert found.stderr[3:, 0] == pytest.approx(1.4826 * 0.1 * 1.5 * kl[3:])


def test_a_measured_site_weighs_both_by_precision() -> None:
    columns = {"kl": [4e-3], "kl_stderr": [0.0]}
    estimated = sensitivities("gradient", delta_loss=[5e-3], stderr=[1e-3], **columns)
    measured = sensitivities("intervention", delta_loss=[7e-3], stderr=[5e-4], **columns)
    found = predicted(pl.concat([estimated, measured]), 1)
    # (f/s)^2 is 1: no first-order part stands out, and c is 0; what is left is kl of both.
    assert found.loss[0, 0] == pytest.approx(4e-3)
    estimated = sensitivities("gradient", delta_loss=[6e-3], stderr=[1e-3], **columns)
    found = predicted(pl.concat([estimated, measured]), 1)
    prior = ((2 / 1) ** 2 - 1) / (4 / 1) ** 2 * (4e-3) ** 2
    c, c_too = (prior / (prior + s**2) for s in (1e-3, 5e-4))
    variance = c * 1e-3**2 + (0.2 * 4e-3) ** 2
    weights = np.array([1 / variance, 1 / (c_too * 5e-4**2)])
    expected = weights @ [4e-3 + c * 2e-3, 4e-3 + c_too * 3e-3] / weights.sum()
    assert found.loss[0, 0] == pytest.approx(expected)
    assert found.stderr[0, 0] == pytest.approx(np.sqrt(c_too) * 5e-4)


def test_changes_below_zero_are_told_by_their_interval() -> None:
    frame = sensitivities("gradient", delta_loss=[-1e-3, -1e-3, 1e-3], stderr=[6e-4, 4e-4, 1e-3])
    found = predicted(frame, 3)
    assert found.loss[:, 0].tolist() == [-1e-3, -1e-3, 1e-3]
    (note,) = found.notes
    assert note.startswith("2 of 3 changes of loss are below zero: 1 within two standard errors")
    assert "1 beyond" in note
    assert predicted(frame.filter(pl.col("delta_loss") > 0), 3).notes == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", ["delta_loss", "stderr", "kl"])
def test_nan_is_refused(tables: Callable[..., Any], column: str, bad: float) -> None:
    made = tables(1)
    site = made.sensitivity["site"][3]
    spoiled = made.sensitivity.with_columns(
        pl.when(pl.col("site") == site).then(bad).otherwise(column).alias(column)
    )
    with pytest.raises(PlanError, match=rf"NaN or infinite .*{site} in .* profile again"):
        read_problem(made.profile, made.errors, spoiled, formats=("int4-g128", "int8-g128"))


def test_inputs_are_not_shrunk() -> None:
    columns = {"delta_loss": [3e-3, 5e-3], "stderr": [1e-2, 1e-2], "kl": [4e-3, 4e-3]}
    frame = sensitivities("gradient", **columns, kl_stderr=[0.0, 0.0])
    sites, formats = ["m.0:weight", "m.1:weight"], tuple(map(parse_format, COLUMNS))
    as_inputs = predict(frame, sites, np.array([True, True]), formats)
    assert as_inputs.loss[:, 0] == pytest.approx([3e-3, 5e-3])
    assert predicted(frame, 2).loss[:, 0] == pytest.approx([4e-3, 4e-3])
