"""Frames to altair charts: one pure function per picture, colors by name (theme.py), no words.

Every frame is small already (summary.py). Data is given inline with explicit types, names stand in
values and never in field names (a dot in a field name draws nothing).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from bitplan.formats import parse_format
from bitplan.reports import summary, theme
from bitplan.reports.numbers import number

CELL_HEIGHT = 28
MOST_LABELED_BLOCKS = 20
SI_LABEL = "format(datum.value, '~s')"
_POWER_LABEL = "datum.value == 0 ? '0' : format(datum.value, '~e')"
SHAPES = ("circle", "diamond", "square", "triangle-up", "cross", "triangle-down", "stroke")

Chart = alt.Chart | alt.LayerChart | alt.FacetChart


def to_spec(chart: Chart) -> dict[str, Any]:
    """Return the Vega-Lite JSON with the house configuration; NaN anywhere in it is an error."""
    spec: dict[str, Any] = chart.properties(width="container").to_dict()
    # The schema's address would be the only address in the file, and selects nothing here.
    del spec["$schema"]
    return spec | {"config": theme.CONFIG}


def inline(frame: pl.DataFrame) -> alt.Chart:
    """Return a chart over a frame's rows, kept inside the chart."""
    return alt.Chart(alt.InlineData(values=frame.to_dicts()))


def sized(chart: Any, height: int) -> Chart:
    """Return a chart with its height; its width is the page's."""
    drawn: Chart = chart.properties(height=height)
    return drawn


def log_ticks(low: float, high: float) -> list[float]:
    """Return round values for a logarithmic axis: 3, 10, 30, 100, fewer on a long one, or more."""
    steps = (1,) if high > 2000 * low else (1, 3) if high > 50 * low else (1, 2, 3, 5, 7)
    ticks = [m * 10.0**p for p in range(-6, 9) for m in steps]
    return [tick for tick in ticks if low <= tick <= high]


def heat_stops(values: Sequence[float]) -> list[float]:
    """Return the values of the heat map's six colors, evenly spaced on a log scale from 2."""
    top = max([*values, 30.0])
    steps = len(theme.HEAT) - 1
    return [2.0 * (top / 2.0) ** (i / steps) for i in range(steps + 1)]


def outlier_map(cells: pl.DataFrame, stops: Sequence[float], *, legend: bool = True) -> Chart:
    """Draw kurtosis by block and role; `stops` from `heat_stops`, shared by both operands."""
    shown = cells.filter(pl.col("block").is_not_null()).with_columns(
        pl.col("kurtosis")
        .map_elements(lambda k: number(k, 2), return_dtype=pl.String)
        .alias("text")
    )
    roles = summary.sort_roles(shown["role"])
    base = inline(shown).encode(
        x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("role:N", title=None, sort=roles, axis=alt.Axis(ticks=False, domain=False)),
        tooltip=[
            alt.Tooltip("site:N"),
            alt.Tooltip("kurtosis:Q", format=",.1f"),
            alt.Tooltip("absmax:Q", title="largest |x|", format=".4g"),
            alt.Tooltip("max_over_rms:Q", title="largest |x| / rms", format=".1f"),
            alt.Tooltip("channel:O", title="strongest channel"),
            alt.Tooltip("token:N", title="strongest token"),
            alt.Tooltip("sites:Q", title="sites in this cell"),
        ],
    )
    scale = alt.Scale(type="log", domain=list(stops), range=list(theme.HEAT), clamp=True)
    key = alt.Legend(
        title="kurtosis (3 is a normal distribution)",
        titleLimit=400,
        gradientLength=240,
        gradientThickness=10,
        values=log_ticks(2, stops[-1]),
        format=",.0f",
    )
    cellmark = base.mark_rect(cornerRadius=3, stroke="theme:paper", strokeWidth=2).encode(
        color=alt.Color("kurtosis:Q", scale=scale, legend=key if legend else None)
    )
    height = CELL_HEIGHT * len(roles)
    if shown["block"].n_unique() > MOST_LABELED_BLOCKS:
        return sized(cellmark, height)
    labels = base.mark_text(fontSize=11).encode(
        text="text:N",
        color=alt.condition(
            alt.datum.kurtosis > math.sqrt(stops[2] * stops[3]),
            alt.value("theme:on_hot"),
            alt.value("theme:on_cool"),
        ),
    )
    return sized(alt.layer(cellmark, labels), height)


def error_chart(errors: pl.DataFrame, domain: Sequence[float]) -> Chart:
    """Draw SQNR by role and format: a dot at the median site, a line from worst to best."""
    roles = summary.sort_roles(errors["role"])
    formats = sorted(errors["format"].unique(), key=lambda name: (parse_format(name).bits, name))
    colors = theme.format_colors(formats)
    shapes = {name: SHAPES[i % len(SHAPES)] for i, name in enumerate(formats)}
    base = inline(errors).encode(
        y=alt.Y("role:N", title=None, sort=roles, axis=alt.Axis(ticks=False, grid=True)),
        yOffset=alt.YOffset("format:N", sort=formats),
        color=alt.Color(
            "format:N",
            title=None,
            scale=alt.Scale(domain=formats, range=[_line_color(colors[f]) for f in formats]),
            legend=alt.Legend(columns=3),
        ),
        tooltip=[
            alt.Tooltip("role:N"),
            alt.Tooltip("format:N"),
            alt.Tooltip("median:Q", title="median (dB)", format=".1f"),
            alt.Tooltip("low:Q", title="worst site (dB)", format=".1f"),
            alt.Tooltip("high:Q", title="best site (dB)", format=".1f"),
            alt.Tooltip("sites:Q"),
        ],
    )
    x_scale = alt.Scale(domain=list(domain), nice=True, zero=False)
    title = "SQNR (dB; more is better)"
    ranges = base.mark_rule(strokeWidth=3, opacity=0.45, strokeCap="round").encode(
        x=alt.X("low:Q", scale=x_scale, title=title, axis=alt.Axis(tickCount=5)), x2="high:Q"
    )
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        x=alt.X("median:Q", scale=x_scale, title=title),
        shape=alt.Shape(
            "format:N",
            scale=alt.Scale(domain=formats, range=[shapes[f] for f in formats]),
            title=None,
        ),
    )
    return sized(alt.layer(ranges, dots), len(roles) * (len(formats) * 14 + 14))


def _line_color(color: str) -> str:
    """Return the color for lines and dots: the pale neutrals are for areas only."""
    dark = {"theme:low": "theme:low3", "theme:low2": "theme:muted", "theme:low3": "theme:ink"}
    return dark.get(color, color)


def _signed_log(values: pl.Series) -> tuple[alt.Scale, list[float]]:
    """Return a scale over several orders of magnitude, negative values included, and its ticks."""
    sizes = values.abs().filter(values != 0)
    if sizes.is_empty():
        return alt.Scale(type="linear"), [0.0]
    small = 10 ** math.floor(math.log10(float(sizes.quantile(0.25) or 1e-9)))
    top = float(sizes.max())  # type: ignore[arg-type]
    bottom = float(values.min())  # type: ignore[arg-type]
    powers = range(round(math.log10(small)), math.floor(math.log10(top)) + 1)
    ticks = [10.0**p for p in powers]
    negative = [-tick for tick in reversed(ticks) if tick <= -bottom]
    domain = [min(bottom * 1.6, 0.0), top * 1.6]
    return alt.Scale(type="symlog", constant=small, domain=domain), [*negative, 0.0, *ticks]


def sensitivity_scatter(points: pl.DataFrame) -> Chart:
    """Draw the loss that quantizing one site costs over the kurtosis of that site."""
    roles = summary.sort_roles(points["role"])
    scale, ticks = _signed_log(points["delta_loss"])
    kurtosis: list[float] = points["kurtosis"].to_list()
    # Weights first: the inputs, which the sentence is about, are drawn over them.
    shown = points.sort("operand", descending=True).with_columns(
        pl.col("site").map_elements(summary.shorten, return_dtype=pl.String)
    )
    drawn = (
        inline(shown)
        .mark_point(filled=True, size=75)
        .encode(
            x=alt.X(
                "kurtosis:Q",
                scale=alt.Scale(type="log", nice=False, padding=12),
                axis=alt.Axis(labelExpr=SI_LABEL, values=log_ticks(min(kurtosis), max(kurtosis))),
                title="kurtosis of the tensor",
            ),
            y=alt.Y(
                "delta_loss:Q",
                scale=scale,
                axis=alt.Axis(values=ticks, labelExpr=_POWER_LABEL),
                title="change of loss (nats per token)",
            ),
            color=alt.Color(
                "role:N",
                title=None,
                scale=alt.Scale(domain=roles, range=[theme.role_color(r) for r in roles]),
            ),
            shape=alt.Shape(
                "operand:N",
                title=None,
                scale=alt.Scale(domain=["input", "weight"], range=["circle", "diamond"]),
                legend=alt.Legend(symbolFillColor="theme:muted", symbolStrokeColor="theme:muted"),
            ),
            opacity=alt.condition(alt.datum.operand == "input", alt.value(0.9), alt.value(0.4)),
            tooltip=[
                alt.Tooltip("site:N"),
                alt.Tooltip("kurtosis:Q", format=",.1f"),
                alt.Tooltip("delta_loss:Q", title="change of loss", format=".3g"),
                alt.Tooltip("method:N"),
            ],
        )
    )
    return sized(drawn, 360)


def plan_map(cells: pl.DataFrame, formats: Sequence[str]) -> Chart:
    """Draw the format of every (role, block); `formats` are all of the plan's, for one legend."""
    roles = summary.sort_roles(cells["role"])
    colors = theme.format_colors(formats)
    ordered = list(colors)
    base = inline(cells).encode(
        x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("role:N", title=None, sort=roles, axis=alt.Axis(ticks=False, domain=False)),
        tooltip=[
            alt.Tooltip("site:N"),
            alt.Tooltip("format:N"),
            alt.Tooltip("same:Q", title="sites of this format"),
            alt.Tooltip("sites:Q", title="sites in this cell"),
            alt.Tooltip("delta_loss:Q", title="predicted change of loss", format=".3g"),
        ],
    )
    rects = base.mark_rect(cornerRadius=3, stroke="theme:paper", strokeWidth=2).encode(
        color=alt.Color(
            "format:N",
            title=None,
            scale=alt.Scale(domain=ordered, range=[colors[f] for f in ordered]),
            legend=alt.Legend(symbolType="square", columns=3),
        )
    )
    labels = base.mark_text(fontSize=11).encode(
        text="bits:Q",
        color=alt.Color(
            "format:N",
            scale=alt.Scale(domain=ordered, range=[theme.text_on(f) for f in ordered]),
            legend=None,
        ),
    )
    drawn = alt.layer(rects, labels).resolve_scale(color="independent")
    return sized(drawn, CELL_HEIGHT * len(roles))


def frontier(points: pl.DataFrame, chosen: Mapping[str, float] | None, unit: str) -> Chart:
    """Draw predicted loss over cost: the best plans as a line, rules by name, the choice ringed.

    `points` from `summary.frontier_points`.
    """
    measure = points["measure"][0]
    costs: list[float] = points["cost"].to_list()
    x = alt.X(
        "cost:Q",
        title=unit,
        scale=alt.Scale(zero=False, padding=16),
        axis=alt.Axis(tickCount=8, format="~s" if max(costs) > 1e4 else "~g"),
    )
    y = alt.Y("value:Q", title=measure, scale=alt.Scale(zero=True), axis=alt.Axis(format="~g"))
    tooltip = [
        alt.Tooltip("label:N"),
        alt.Tooltip("cost:Q", title=unit, format=".4g"),
        alt.Tooltip("value:Q", title=measure, format=".3g"),
        alt.Tooltip("weight_bits:Q", title="weight bits", format=".3f"),
        alt.Tooltip("input_bits:Q", title="input bits", format=".3f"),
    ]
    best = points.filter(pl.col("label") == summary.OPTIMAL).sort("cost")
    layers: list[alt.Chart] = [
        inline(best)
        .mark_line(color="theme:eight", strokeWidth=2, point={"color": "theme:eight", "size": 30})
        .encode(x=x, y=y, tooltip=tooltip)
    ]
    rules = summary.rules(points)
    if not rules.is_empty():
        marks = inline(rules).encode(x=x, y=y, tooltip=tooltip)
        layers.append(
            marks.mark_point(filled=True, size=80, color="theme:w4a4", shape="diamond", opacity=1)
        )
        middle = (max(costs) + min(costs)) / 2
        names = summary.merge_labels(points).with_columns(right=pl.col("cost") > middle)
        for rows in names.partition_by("right"):
            # Text runs towards the middle, where there is room for it.
            right = rows["right"][0]
            label = inline(rows).mark_text(
                align="right" if right else "left",
                dx=-9 if right else 9,
                dy=-12 if right else -8,
                color="theme:w4a4",
            )
            layers.append(label.encode(x=x, y=y, text="label:N"))
    if chosen is not None:
        ring = inline(pl.DataFrame([{**chosen, "label": "this plan"}])).encode(x=x, y=y)
        layers += [
            ring.mark_point(size=260, strokeWidth=2.5, color="theme:ink", opacity=1),
            ring.mark_text(
                align="right", dx=-13, dy=12, fontWeight="bold", color="theme:ink"
            ).encode(text="label:N"),
        ]
    return sized(alt.layer(*layers), 320)
