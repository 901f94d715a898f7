"""Charts drawn without a browser: marks in the scene graph against naive counts of the data."""

import itertools
from collections import Counter
from typing import Any

import polars as pl
import pytest
import vl_convert

from bitplan import tables
from bitplan.reports import arm_charts, charts, summary, theme

from .conftest import ARMS, FORMATS, Synthetic

MADE = Synthetic(blocks=5, seed=3)
PROFILE = tables.PROFILE.frame(MADE.profile)
TOKENS = {f"{theme.PREFIX}{name}" for name in theme.LIGHT}


def marks(chart: charts.Chart) -> Counter[str]:
    """Return how many items of each type of mark a chart draws."""
    spec = theme.resolve(charts.to_spec(chart), theme.LIGHT)
    found: Counter[str] = Counter()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("role") == "mark":
                found[node["marktype"]] += len(node["items"])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(vl_convert.vegalite_to_scenegraph(spec))
    return found


def test_the_outlier_map_has_a_cell_per_role_and_block() -> None:
    cells = summary.site_map(PROFILE, "input")
    stops = charts.heat_stops(cells["kurtosis"].to_list())
    wanted = {(r["role"], r["block"]) for r in MADE.profile if r["block"] is not None}
    assert marks(charts.outlier_map(cells, stops)) == {"rect": len(wanted), "text": len(wanted)}


@pytest.mark.parametrize("blocks", [1, 60])
def test_the_map_takes_1_to_60_blocks(blocks: int) -> None:
    made = Synthetic(blocks=blocks)
    cells = summary.site_map(tables.PROFILE.frame(made.profile), "input")
    stops = charts.heat_stops(cells["kurtosis"].to_list())
    assert marks(charts.outlier_map(cells, stops))["rect"] == 4 * blocks


def test_heat_stops_are_evenly_spaced_and_reach_the_largest_value() -> None:
    stops = charts.heat_stops([4.0, 900.0])
    assert len(stops) == len(theme.HEAT)
    assert stops[0] == 2.0
    assert stops[-1] == pytest.approx(900.0)
    factors = [b / a for a, b in itertools.pairwise(stops)]
    assert factors == pytest.approx([factors[0]] * len(factors))


def test_the_error_chart_has_a_dot_per_role_and_format() -> None:
    frame = summary.format_errors(tables.ERRORS.frame(MADE.errors), PROFILE, "weight")
    assert marks(charts.error_chart(frame, [0, 60]))["symbol"] == 4 * len(FORMATS)


def test_the_scatter_has_a_point_per_measured_site_negative_ones_too() -> None:
    points = summary.sensitivity_points(
        tables.SENSITIVITY.frame(MADE.sensitivity), PROFILE, FORMATS[0]
    )
    rows = [row for row in MADE.sensitivity if row["format"] == FORMATS[0]]
    assert any(row["delta_loss"] < 0 for row in rows)
    assert marks(charts.sensitivity_scatter(points)) == {"symbol": len(rows)}


def test_the_plan_map_has_a_cell_per_role_and_block_with_its_bits() -> None:
    sites = summary.plan_sites(MADE.plan())
    cells = summary.plan_map(sites, "weight")
    wanted = {(e["role"], e["block"]) for e in MADE.plan_sites.values() if e["block"] is not None}
    assert marks(charts.plan_map(cells, list(FORMATS))) == {
        "rect": len(wanted),
        "text": len(wanted),
    }


def test_the_frontier_has_every_plan_and_the_ring() -> None:
    points = summary.frontier_points(tables.FRONTIER.frame(MADE.frontier()), "input_bits")
    chosen = summary.chosen_point(points, MADE.plan())
    assert chosen == {"cost": 5.32, "value": 0.0191}
    optimal = sum(row["label"] == "optimal" for row in MADE.frontier())
    rules = sum(row["label"] not in ("optimal", "plan") for row in MADE.frontier())
    found = marks(charts.frontier(points, chosen, "bits"))
    assert found["symbol"] == optimal + rules + 1
    assert found["text"] == summary.merge_labels(points).height + 1


def test_curves_have_a_line_and_a_band_per_arm() -> None:
    frame = pl.DataFrame(
        [
            {"arm": arm, "tokens": t, "mean": 0.1, "low": 0.0, "high": 0.2, "seeds": 3}
            for arm in ARMS
            for t in (1, 2, 3)
        ]
    )
    drawn = marks(arm_charts.curves(frame, "loss", band=True))
    # A line or an area is drawn from one item per point.
    assert drawn == {"line": 3 * len(ARMS), "area": 3 * len(ARMS)}


def intervals(
    key: str, values: dict[str, tuple[float, float | None, float | None]]
) -> pl.DataFrame:
    rows = [{key: n, "estimate": e, "low": lo, "high": hi} for n, (e, lo, hi) in values.items()]
    return pl.DataFrame(
        rows, schema={key: pl.String, "estimate": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    )


def test_deltas_have_a_dot_an_interval_and_a_tick_per_seed() -> None:
    frame = intervals("arm", {"w4a4": (0.04, 0.03, 0.05), "planned": (0.02, 0.01, 0.03)})
    seeds = pl.DataFrame({"arm": ["w4a4"] * 3, "seed": [0, 1, 2], "value": [0.03, 0.04, 0.05]})
    found = marks(arm_charts.delta_chart(frame, seeds))
    assert (found["symbol"], found["text"]) == (2, 2)
    assert found["rule"] == 2 + 1  # and the line at zero
    assert found["rect"] == 3


def test_a_ratio_without_bounds_is_still_drawn() -> None:
    frame = intervals("label", {"before": (5.0, 4.0, 6.0), "after": (1.1, None, None)})
    found = marks(arm_charts.ratio_chart(frame, (0.8, 1.25)))
    assert found["symbol"] == 2
    assert found["rect"] == 1
    assert found["rule"] == 1 + 1 + 1  # R = 1, the interval, and the open one


def every_spec() -> list[dict[str, Any]]:
    cells = summary.site_map(PROFILE, "input")
    points = summary.frontier_points(tables.FRONTIER.frame(MADE.frontier()), "input_bits")
    errors = summary.format_errors(tables.ERRORS.frame(MADE.errors), PROFILE, "input")
    sites = summary.plan_sites(MADE.plan())
    drawn = [
        charts.outlier_map(cells, charts.heat_stops([5.0])),
        charts.error_chart(errors, [0, 60]),
        charts.frontier(points, None, "bits"),
        charts.plan_map(summary.plan_map(sites, "input"), ["bf16", "int4-g128", "fp8-e4m3"]),
    ]
    return [charts.to_spec(chart) for chart in drawn]


def test_every_color_is_named_and_in_both_palettes() -> None:
    assert theme.LIGHT.keys() == theme.DARK.keys()

    def names(node: Any) -> set[str]:
        if isinstance(node, dict):
            return {n for k, v in node.items() if k != "datasets" for n in names(v)}
        if isinstance(node, list):
            return {n for value in node for n in names(value)}
        return {node} if isinstance(node, str) and node.startswith(theme.PREFIX) else set()

    for spec in every_spec():
        assert names(spec)
        assert names(spec) <= TOKENS
        assert names(theme.resolve(spec, theme.DARK)) == set()


def test_specs_name_no_address() -> None:
    assert all("http" not in str(spec) for spec in every_spec())


def test_a_layer_called_like_a_color_keeps_its_name() -> None:
    spec = {"datasets": {"d": [{"site": "theme:ink"}]}, "mark": {"color": "theme:ink"}}
    assert theme.resolve(spec, theme.LIGHT) == {
        "datasets": {"d": [{"site": "theme:ink"}]},
        "mark": {"color": theme.LIGHT["ink"]},
    }


def test_formats_of_one_width_keep_apart() -> None:
    names = ["bf16", "int4-g128", "nvfp4", "mxfp4", "int8-g128", "fp8-e4m3", "int8-token"]
    colors = theme.format_colors(names)
    assert len(set(colors.values())) == len(names)
    assert all("low" in colors[name] for name in ("int4-g128", "nvfp4", "mxfp4"))
    assert all("eight" in colors[name] for name in ("int8-g128", "fp8-e4m3", "int8-token"))


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [theme.LIGHT, theme.DARK])
def test_text_can_be_read_and_marks_be_seen(palette: dict[str, str]) -> None:
    for text, paper in (
        ("ink", "paper"),
        ("muted", "paper"),
        ("on_low", "low"),
        ("on_eight", "eight"),
        ("on_full", "full"),
        ("w4a4", "paper"),
        ("on_cool", "heat0"),
        ("on_cool", "heat1"),
        ("on_hot", "heat4"),
        ("on_hot", "heat5"),
    ):
        assert contrast(palette[text], palette[paper]) >= 4.5, (text, paper)
    for text, cell in (("on_cool", "heat2"), ("on_hot", "heat3")):
        assert contrast(palette[text], palette[cell]) >= 3.9, (text, cell)
    for mark in ("qkv", "o", "fc1", "fc2", "w4a16", "w16a4", "planned", "bf16", "low3", "eight"):
        needed = 2.8 if mark == "low3" else 3.0
        assert contrast(palette[mark], palette["paper"]) >= needed, mark
