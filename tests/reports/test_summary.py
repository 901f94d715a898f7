import statistics
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from bitplan import tables
from bitplan.reports import arm_summary, summary
from bitplan.reports.load import Arm, load_run

from .conftest import FORMATS, MakeRun, Synthetic

MADE = Synthetic(blocks=4, experts=3, seed=5)
PROFILE = tables.PROFILE.frame(MADE.profile)


def rows_of(operand: str) -> list[dict[str, Any]]:
    return [row for row in MADE.profile if row["operand"] == operand]


@pytest.mark.parametrize("operand", ["input", "weight"])
def test_a_cell_of_the_map_is_its_worst_site(operand: str) -> None:
    cells = summary.site_map(PROFILE, operand)
    wanted: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in rows_of(operand):
        wanted.setdefault((row["role"], row["block"]), []).append(row)
    assert cells.height == len(wanted)
    for cell in cells.iter_rows(named=True):
        group = wanted[cell["role"], cell["block"]]
        worst = max(group, key=lambda row: row["kurtosis"])
        assert cell["kurtosis"] == worst["kurtosis"]
        assert cell["site"] == worst["site"]
        assert cell["sites"] == len(group)
        assert cell["channel"] == 17
        assert cell["token"] == (repr(MADE.token) if operand == "input" else None)


def test_only_the_last_step_is_mapped() -> None:
    later = PROFILE.with_columns(pl.lit(7, pl.Int64).alias("step"), pl.col("kurtosis") * 2)
    twice = summary.site_map(pl.concat([PROFILE, later]), "input")
    assert twice["kurtosis"].max() == 2 * max(row["kurtosis"] for row in rows_of("input"))


def test_format_errors_against_a_naive_loop() -> None:
    found = summary.format_errors(tables.ERRORS.frame(MADE.errors), PROFILE, "input")
    roles = {row["site"]: row["role"] for row in rows_of("input") if row["block"] is not None}
    for row in found.iter_rows(named=True):
        values = [
            e["sqnr_db"]
            for e in MADE.errors
            if roles.get(e["site"]) == row["role"] and e["format"] == row["format"]
        ]
        assert row["low"] == min(values)
        assert row["high"] == max(values)
        assert row["median"] == pytest.approx(statistics.median(values))
        assert row["sites"] == len(values)
    assert found.height == 4 * len(FORMATS)


def test_a_measured_sensitivity_replaces_the_estimate() -> None:
    site = MADE.sensitivity[0]["site"]
    measured = MADE.sensitivity[0] | {"method": "intervention", "delta_loss": 0.125}
    frame = tables.SENSITIVITY.frame([measured, *MADE.sensitivity])
    points = summary.sensitivity_points(frame, PROFILE, FORMATS[0])
    assert points["site"].is_unique().all()
    assert points.height == len(MADE.sensitivity) / len(FORMATS)
    assert points.filter(pl.col("site") == site)["delta_loss"].to_list() == [0.125]


def test_plan_maps_show_the_most_bits_of_a_cell() -> None:
    sites = summary.plan_sites(MADE.plan())
    cells = summary.plan_map(sites, "input")
    for cell in cells.iter_rows(named=True):
        entries = [
            entry
            for name, entry in MADE.plan_sites.items()
            if name.endswith(":input")
            and (entry["role"], entry["block"]) == (cell["role"], cell["block"])
        ]
        most = max(int(entry["format"][3]) for entry in entries)
        assert cell["bits"] == most
        assert cell["sites"] == len(entries)
        assert cell["same"] == sum(int(entry["format"][3]) == most for entry in entries)
    raised = {n for n, e in MADE.plan_sites.items() if e["planned"] and "int8" in e["format"]}
    assert set(summary.raised_sites(sites)["site"]) == raised
    assert summary.base_formats(sites) == dict.fromkeys(("input", "weight"), FORMATS[0])


def test_a_plan_with_the_keys_of_the_design_alone_is_read() -> None:
    entry = {"format": "int4-g128", "role": "fc2", "reason": "", "delta_loss": None}
    sites = summary.plan_sites({"sites": {"model.layers.3.mlp.down_proj:input": entry}})
    assert sites.select("block", "operand", "planned").row(0) == (3, "input", True)


def arm(name: str, seed: int, losses: list[float], **record: Any) -> Arm:
    metrics = tables.METRICS.frame(
        {"step": i + 1, "tokens": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)
    )
    return Arm(name=name, seed=seed, record=record, metrics=metrics, stats=None)


def test_deltas_are_paired_by_seed_and_step() -> None:
    arms = (
        arm("bf16", 0, [5.0, 4.0, 3.0]),
        arm("bf16", 1, [7.0, 2.0, 1.0]),
        arm("w4a4", 0, [5.5, 4.25, 3.5]),
        arm("w4a4", 1, [7.25, 2.75, 1.25]),
    )
    curve = arm_summary.delta_curves(arm_summary.losses(arms))
    assert curve["tokens"].to_list() == [10, 20, 30]
    assert curve["mean"].to_list() == [0.375, 0.5, 0.375]
    assert curve["low"].to_list() == [0.25, 0.25, 0.25]
    assert curve["high"].to_list() == [0.5, 0.75, 0.5]
    assert curve["seeds"].to_list() == [2, 2, 2]


def test_a_seed_that_is_behind_is_left_out() -> None:
    arms = (arm("bf16", 0, [5.0, 4.0]), arm("bf16", 1, [9.0]))
    curve = arm_summary.loss_curves(arm_summary.losses(arms))
    assert curve["mean"].to_list() == [5.0, 4.0]
    assert curve["seeds"].to_list() == [1, 1]


def test_long_curves_are_thinned_but_keep_their_ends() -> None:
    curve = arm_summary.loss_curves(arm_summary.losses((arm("bf16", 0, [1.0] * 5000),)))
    assert curve.height == arm_summary.CURVE_POINTS
    assert curve["tokens"].to_list()[:: curve.height - 1] == [10, 50_000]


def test_attribution_arms_are_not_drawn_as_curves() -> None:
    arms = (arm("w4a4", 0, [1.0]), arm("w4a4-fc2-input-8", 0, [1.0]))
    assert arm_summary.losses(arms)["arm"].to_list() == ["w4a4"]
    swept = (arm("w4a4-g32", 0, [1.0]), arm("w4a4-fc2-8-row", 0, [1.0]))
    assert len(arm_summary.losses(swept)) == 2


def test_a_copy_of_an_arm_is_named_and_drawn_once() -> None:
    arms = (arm("w4a16", 0, [1.0]), arm("planned-weights", 0, [1.0], same_as="w4a16"))
    assert arm_summary.losses(arms)["arm"].to_list() == ["w4a16"]
    assert arm_summary.copies(arms) == {"planned-weights": "w4a16"}


def test_training_statistics_are_medians_of_inputs(make_run: MakeRun) -> None:
    run = load_run(make_run(blocks=3, seeds=2, steps=8))
    found = arm_summary.training_stats(run.arms)
    for row in found.filter(pl.col("arm") == "w4a4").iter_rows(named=True):
        values: list[float] = []
        for one in run.arms:
            if one.name == "w4a4" and one.stats is not None:
                values += [
                    s["kurtosis"]
                    for s in one.stats.iter_rows(named=True)
                    if (s["operand"], s["role"], s["step"]) == ("input", row["role"], row["step"])
                    and s["block"] is not None
                ]
        assert row["kurtosis"] == pytest.approx(statistics.median(values))


def test_names_of_rules_that_stand_together_are_joined() -> None:
    points = summary.frontier_points(tables.FRONTIER.frame(MADE.frontier()), "input_bits")
    labels = summary.merge_labels(points)["label"].to_list()
    assert "fc2, kurtosis" in labels or "kurtosis, fc2" in labels
    assert "uniform" in labels
    assert "plan" not in labels
    assert "optimal" not in labels


def test_without_sensitivity_the_frontier_is_of_the_objective(tmp_path: Path) -> None:
    frame = tables.FRONTIER.frame(MADE.frontier()).with_columns(
        pl.lit(None, pl.Float64).alias("delta_loss"), pl.lit(0.5).alias("objective")
    )
    points = summary.frontier_points(frame, "input_bits")
    assert points["value"].unique().to_list() == [0.5]
    assert "relative error" in points["measure"][0]


def test_long_names_are_cut_in_the_middle() -> None:
    assert summary.shorten("short") == "short"
    cut = summary.shorten("a" * 300 + "down_proj:input")
    assert len(cut) <= summary.NAME_LENGTH
    assert cut.endswith("down_proj:input")


def test_thinned_points_keep_the_extremes() -> None:
    n = 10_000
    points = pl.DataFrame(
        {
            "site": [f"s{i}" for i in range(n)],
            "delta_loss": [((i * 7919) % n - 3000) / n for i in range(n)],
            "kurtosis": [float((i * 104729) % n) for i in range(n)],
        }
    )
    kept = summary.thin_points(points)
    assert kept.height <= summary.MOST_POINTS
    assert kept.height > 0.8 * summary.MOST_POINTS
    assert kept["site"].is_unique().all()
    assert kept["kurtosis"].max() == points["kurtosis"].max()
    assert kept["delta_loss"].max() == points["delta_loss"].max()
    few = points.head(summary.MOST_POINTS)
    assert summary.thin_points(few).equals(few)
