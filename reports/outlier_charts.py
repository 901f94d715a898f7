"""Charts of where the outliers are: tokens, channels, and how experts share the tokens."""

import altair as alt
import polars as pl

from bitplan.reports.charts import CELL_HEIGHT, SI_LABEL, Chart, inline, log_ticks, sized
from bitplan.reports.outlier_summary import COUNTED

_ROW_HEIGHT = 26
_SMALLEST, _TALLEST = 60, 600
_MOST_LABELED = 32


def token_chart(points: pl.DataFrame) -> Chart:
    """Draw each input's kurtosis with all tokens and without some, from `token_points`."""
    order = points["input"].unique(maintain_order=True).to_list()
    values: list[float] = points["kurtosis"].to_list()
    x = alt.X(
        "kurtosis:Q",
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(labelExpr=SI_LABEL, values=log_ticks(min(values), max(values))),
        title="kurtosis (3 is a normal distribution)",
    )
    y = alt.Y("input:N", title=None, sort=order, axis=alt.Axis(ticks=False, grid=True))
    base = inline(points)
    line = base.mark_rule(strokeWidth=3, opacity=0.35, strokeCap="round", color="theme:muted")
    names = list(COUNTED.values())
    dots = base.mark_point(filled=True, size=85, opacity=1).encode(
        x=x,
        y=y,
        color=alt.Color(
            "counted:N",
            title=None,
            sort=names,
            scale=alt.Scale(domain=names, range=["theme:w4a4", "theme:w16a4", "theme:eight"]),
            legend=alt.Legend(labelLimit=300),
        ),
        shape=alt.Shape(
            "counted:N",
            title=None,
            sort=names,
            scale=alt.Scale(domain=names, range=["circle", "diamond", "square"]),
        ),
        tooltip=[
            alt.Tooltip("input:N"),
            alt.Tooltip("counted:N", title="kurtosis of"),
            alt.Tooltip("kurtosis:Q", format=",.1f"),
            alt.Tooltip("tokens:N", title="strongest tokens"),
        ],
    )
    lines = line.encode(
        x=alt.X("min(kurtosis):Q", scale=alt.Scale(type="log", nice=False, padding=14)),
        x2="max(kurtosis):Q",
        y=y,
    )
    return sized(alt.layer(lines, dots), _ROW_HEIGHT * len(order))


def channel_map(cells: pl.DataFrame) -> Chart:
    """Draw in which blocks a channel is among the largest, from `channel_cells`."""
    order = cells["channel"].unique(maintain_order=True).to_list()
    drawn = (
        inline(cells)
        .mark_rect(cornerRadius=2, stroke="theme:paper", strokeWidth=2)
        .encode(
            x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y(
                "channel:O", title="channel", sort=order, axis=alt.Axis(ticks=False, domain=False)
            ),
            color=alt.Color(
                "stability:Q",
                scale=alt.Scale(domain=[0, 1], range=["theme:low", "theme:eight"]),
                legend=alt.Legend(
                    title="share of the sequences in which it is among the 8 largest",
                    titleLimit=400,
                    gradientLength=240,
                    gradientThickness=10,
                    values=[0, 0.5, 1],
                    format="%",
                ),
            ),
            tooltip=[
                alt.Tooltip("channel:O"),
                alt.Tooltip("block:O"),
                alt.Tooltip("roles:N", title="inputs of"),
                alt.Tooltip("stability:Q", title="share of sequences", format=".0%"),
                alt.Tooltip("absmax:Q", title="largest |x|", format=".4g"),
            ],
        )
    )
    return sized(drawn, 22 * len(order))


def routing_map(experts: pl.DataFrame) -> Chart:
    """Draw how often each expert was routed to; those never routed to are outlined and empty."""
    most = max([2.0, *experts["load"].drop_nulls().to_list()])
    x = alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y = alt.Y("block:O", title="block", axis=alt.Axis(ticks=False, domain=False))
    tooltip = [
        alt.Tooltip("block:O"),
        alt.Tooltip("expert:O"),
        alt.Tooltip("tokens:Q", title="tokens routed here", format=","),
        alt.Tooltip("share:Q", title="of the block's", format=".1%"),
        alt.Tooltip("load:Q", title="times an even share", format=".2f"),
    ]
    reached = experts.filter(pl.col("tokens") > 0)
    layers: list[alt.Chart] = [
        inline(reached)
        .mark_rect(cornerRadius=2, stroke="theme:paper", strokeWidth=1)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "load:Q",
                scale=alt.Scale(
                    domain=[0, 1, most], range=["theme:heat0", "theme:heat1", "theme:heat3"]
                ),
                legend=alt.Legend(
                    title="times an even share of the tokens",
                    titleLimit=300,
                    gradientLength=200,
                    gradientThickness=10,
                    format=".2~f",
                ),
            ),
            tooltip=tooltip,
        )
    ]
    silent = experts.filter(pl.col("tokens") == 0)
    if not silent.is_empty():
        marks = inline(silent).encode(x=x, y=y, tooltip=tooltip)
        layers.append(
            marks.mark_rect(
                cornerRadius=2, fill="theme:paper", stroke="theme:faint", strokeDash=[2, 2]
            )
        )
        if experts["expert"].n_unique() <= _MOST_LABELED:
            layers.append(
                inline(silent.with_columns(label=pl.lit("\u2013")))
                .mark_text(color="theme:muted")
                .encode(x=x, y=y, text="label:N")
            )
    blocks = experts["block"].n_unique()
    return sized(alt.layer(*layers), max(_SMALLEST, blocks * min(CELL_HEIGHT, _TALLEST // blocks)))
