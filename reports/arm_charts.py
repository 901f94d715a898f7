"""Charts of the trainings: losses, statistics over steps, delta and R with their intervals.

As in charts.py: pure functions from small frames, colors by name, no words.
"""

from collections.abc import Sequence

import altair as alt
import polars as pl

from bitplan.reports import theme
from bitplan.reports.arm_summary import arm_rank
from bitplan.reports.charts import SI_LABEL, Chart, inline, log_ticks, sized
from bitplan.reports.numbers import NATS_DIGITS, RATIO_DIGITS, estimate


def _arm_scale(arms: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(arms), range=[theme.arm_color(arm) for arm in arms])


def arm_names(frame: pl.DataFrame) -> list[str]:
    """Return the arms of a frame in the order of every list and axis."""
    return sorted(frame["arm"].unique().to_list(), key=arm_rank)


def _dash(arms: Sequence[str]) -> alt.StrokeDash:
    """Dash the arms that share another arm's color: no two lines look the same."""
    dashes = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]
    used: dict[str, int] = {}
    spans = []
    for arm in arms:
        color = theme.arm_color(arm)
        spans.append(dashes[used.get(color, 0) % len(dashes)])
        used[color] = used.get(color, 0) + 1
    return alt.StrokeDash("arm:N", title=None, scale=alt.Scale(domain=list(arms), range=spans))


def curves(frame: pl.DataFrame, title: str, *, band: bool) -> Chart:
    """Draw a smoothed value of each arm over tokens; `band` adds the seeds' spread, from zero."""
    arms = arm_names(frame)
    x = alt.X("tokens:Q", title="training tokens", axis=alt.Axis(labelExpr=SI_LABEL, tickCount=6))
    y_scale = alt.Scale(zero=band, nice=True)
    legend = alt.Legend(symbolType="stroke", symbolOpacity=1, symbolStrokeWidth=2.5, symbolSize=220)
    color = alt.Color("arm:N", title=None, scale=_arm_scale(arms), legend=legend)
    base = inline(frame).encode(x=x, color=color)
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("mean:Q", title=title, scale=y_scale),
        strokeDash=_dash(arms),
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("tokens:Q", format=",.0f"),
            alt.Tooltip("mean:Q", format=".4f"),
            alt.Tooltip("low:Q", title="lowest seed", format=".4f"),
            alt.Tooltip("high:Q", title="highest seed", format=".4f"),
            alt.Tooltip("seeds:Q"),
        ],
    )
    if not band:
        return sized(line, 220)
    spread = base.mark_area(opacity=0.16).encode(
        y=alt.Y("low:Q", title=title, scale=y_scale), y2="high:Q"
    )
    return sized(alt.layer(spread, line), 300)


def stats_lines(frame: pl.DataFrame, roles: Sequence[str], domain: Sequence[float]) -> Chart:
    """Draw the inputs' kurtosis by role over the steps of one arm's training."""
    drawn = (
        inline(frame)
        .mark_line(strokeWidth=2, point={"size": 22})
        .encode(
            x=alt.X(
                "step:Q",
                title="step",
                axis=alt.Axis(tickCount=5, labelExpr=SI_LABEL, labelOverlap="greedy"),
            ),
            y=alt.Y(
                "kurtosis:Q",
                title="kurtosis of inputs",
                scale=alt.Scale(type="log", domain=list(domain), nice=False),
                axis=alt.Axis(labelExpr=SI_LABEL, values=log_ticks(domain[0], domain[1])),
            ),
            color=alt.Color(
                "role:N",
                title=None,
                scale=alt.Scale(domain=list(roles), range=[theme.role_color(r) for r in roles]),
            ),
            tooltip=["role:N", "step:Q", alt.Tooltip("kurtosis:Q", format=",.1f")],
        )
    )
    return sized(drawn, 240)


def delta_chart(intervals: pl.DataFrame, seeds: pl.DataFrame) -> Chart:
    """Draw each arm's delta with its interval; `seeds` (arm, value) are the single trainings."""
    arms = arm_names(intervals)
    y = alt.Y("arm:N", title=None, sort=arms, axis=alt.Axis(ticks=False, domain=False))
    color = alt.Color("arm:N", scale=_arm_scale(arms), legend=None)
    title = "delta: final held-out loss above bf16 (nats per token)"
    shown = intervals.with_columns(
        pl.struct("estimate", "low", "high")
        .map_elements(lambda v: estimate(v, NATS_DIGITS), return_dtype=pl.String)
        .alias("text")
    )
    base = inline(shown).encode(
        y=y,
        color=color,
        tooltip=[
            "arm:N",
            alt.Tooltip("estimate:Q", format=".5f"),
            alt.Tooltip("low:Q", format=".5f"),
            alt.Tooltip("high:Q", format=".5f"),
        ],
    )
    x = alt.X("estimate:Q", title=title, axis=alt.Axis(format="~g", tickCount=6))
    zero = (
        alt.Chart(alt.InlineData(values=[{"zero": 0}]))
        .mark_rule(color="theme:axis")
        .encode(x=alt.X("zero:Q", title=title))
    )
    layers = [
        zero,
        base.mark_rule(strokeWidth=3, strokeCap="round", opacity=0.5).encode(
            x=alt.X("low:Q", title=title), x2="high:Q"
        ),
        base.mark_point(filled=True, size=110, opacity=1).encode(x=x),
        base.mark_text(dy=-12, fontSize=11.5).encode(x=x, text="text:N"),
    ]
    if not seeds.is_empty():
        ticks = inline(seeds).mark_tick(thickness=1.5, size=12, opacity=0.7)
        layers.insert(2, ticks.encode(y=y, color=color, x=alt.X("value:Q", title=title)))
    return sized(alt.layer(*layers), 44 * len(arms))


def attribution_chart(given_back: pl.DataFrame) -> Chart:
    """Draw what 8 bits at each role and operand alone give back of w4a4's delta."""
    labels = given_back["label"].to_list()
    roles = list(dict.fromkeys(given_back["role"]))
    title = "given back of w4a4's delta by 8 bits there alone (nats per token)"
    x = alt.X("estimate:Q", title=title, axis=alt.Axis(format="~g", tickCount=6))
    ends = ("estimate", "low", "high")
    base = inline(given_back).encode(
        y=alt.Y("label:N", title=None, sort=labels, axis=alt.Axis(ticks=False, domain=False)),
        color=alt.Color(
            "role:N",
            scale=alt.Scale(domain=roles, range=[theme.role_color(role) for role in roles]),
            legend=None,
        ),
        tooltip=["role:N", "operand:N", *(alt.Tooltip(f"{e}:Q", format=".5f") for e in ends)],
    )
    drawn = alt.layer(
        base.mark_bar(opacity=0.8, height=13).encode(x=x),
        base.mark_rule(strokeWidth=2, color="theme:ink").encode(
            x=alt.X("low:Q", title=title), x2="high:Q", color=alt.value("theme:ink")
        ),
    )
    return sized(drawn, 26 * len(labels))


def ratio_chart(intervals: pl.DataFrame, tolerance: Sequence[float]) -> Chart:
    """Draw R before and after with their intervals, and the band in which errors converge."""
    labels = intervals["label"].to_list()
    finite = intervals.select(
        pl.concat_list("low", "estimate", "high").explode().drop_nulls().alias("v")
    ).filter(pl.col("v") > 0)["v"]
    edges = [*finite.to_list(), *tolerance]
    scale = alt.Scale(type="log", domain=[min(edges) / 1.25, max(edges) * 1.25], nice=False)
    x = alt.X(
        "estimate:Q",
        title="R: delta of quantized inputs over delta of quantized weights (log scale)",
        scale=scale,
        axis=alt.Axis(values=_ratio_ticks(edges), format="~g"),
    )
    y = alt.Y(
        "label:N",
        title=None,
        sort=labels,
        axis=alt.Axis(ticks=False, domain=False, labelLimit=180),
    )
    band = (
        alt.Chart(alt.InlineData(values=[{"from": tolerance[0], "to": tolerance[1]}]))
        .mark_rect(color="theme:band")
        .encode(x=alt.X("from:Q", scale=scale), x2="to:Q")
    )
    one = (
        alt.Chart(alt.InlineData(values=[{"one": 1}]))
        .mark_rule(color="theme:axis", strokeDash=[3, 3])
        .encode(x=alt.X("one:Q", scale=scale))
    )
    open_ended = intervals.filter(pl.col("low").is_null()).with_columns(
        left=pl.lit(min(edges) / 1.25), right=pl.lit(max(edges) * 1.25)
    )
    shown = intervals.filter(pl.col("estimate") > 0).with_columns(
        # On a log axis an interval that reaches zero runs to the edge.
        pl.col("low").clip(lower_bound=min(edges) / 1.25),
        pl.struct("estimate", "low", "high")
        .map_elements(lambda v: estimate(v, RATIO_DIGITS), return_dtype=pl.String)
        .alias("text"),
    )
    color = alt.Color(
        "label:N",
        scale=alt.Scale(
            domain=labels,
            range=["theme:planned" if "after" in label else "theme:w4a4" for label in labels],
        ),
        legend=None,
    )
    base = inline(shown).encode(
        y=y,
        color=color,
        tooltip=[
            alt.Tooltip("label:N"),
            *(alt.Tooltip(f"{end}:Q", format=".3f") for end in ("estimate", "low", "high")),
        ],
    )
    drawn = alt.layer(
        band,
        one,
        # No bounds: the line goes on at both ends.
        inline(open_ended)
        .mark_rule(strokeWidth=3, strokeDash=[2, 5], opacity=0.5)
        .encode(y=y, color=color, x=alt.X("left:Q", scale=scale), x2="right:Q"),
        base.mark_rule(strokeWidth=3, strokeCap="round", opacity=0.5).encode(
            x=alt.X("low:Q", scale=scale), x2="high:Q"
        ),
        base.mark_point(filled=True, size=130, opacity=1).encode(x=x),
        base.mark_text(dy=-13, fontSize=11.5).encode(x=x, text="text:N"),
    )
    return sized(drawn, 52 * len(labels))


def _ratio_ticks(edges: Sequence[float]) -> list[float]:
    """Return round ticks for a ratio's axis, the ends of the default band among them."""
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 3, 5, 10, 20, 50, 100, 200, 500)
    return [tick for tick in ticks if min(edges) / 1.25 <= tick <= max(edges) * 1.25]
