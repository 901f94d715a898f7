"""`bitplan law crossover --chart`: the crossover as one HTML file, drawn as the reports are."""

from pathlib import Path

import altair as alt
import polars as pl

from bitplan.forecast import Crossover
from bitplan.reports.charts import Chart, inline, sized
from bitplan.reports.figures import figure
from bitplan.reports.markup import el
from bitplan.reports.page import page
from bitplan.rundir import write_atomic

WORDS = {
    "all_inputs_at_4": "all inputs at 4 bits",
    "fc2_inputs_at_8": "FC2 inputs at 8 bits",
}
GROUP_COLORS = ("qkv", "o", "fc1", "fc2", "eight", "full")


def write_crossover(crossover: Crossover, path: Path) -> None:
    """Write the chart and its table; raise RunError where the place cannot be written."""
    rows = crossover_rows(crossover)
    title = "Where the weights come to cost as much as the inputs"
    drawn = figure(
        "crossover",
        crossover_chart(rows),
        title=title,
        takeaway="Below a line the inputs cost more, above it the weights do.",
        note="Hollow points lie outside the ranges that the law was fitted on. Where there is no "
        "point, the weights never come to cost as much.",
        data=rows,
    )
    lead = el("p", f"Tokens at which R = 1, by the law of {crossover.source}.", class_="lead")
    article = el("article", el("section", el("h1", title), lead, drawn), class_="run")
    content = page(f"bitplan: {title.lower()}", [], [article]).encode()
    write_atomic(path, lambda file: file.write(content))


def crossover_rows(crossover: Crossover) -> pl.DataFrame:
    """Return a row per N, G and kind of inputs, without tokens where the weights never catch up."""
    return pl.DataFrame(
        [
            {
                "params": float(row["params"]),
                "group_size": f"G {row['group_size']:g}",
                "inputs": words,
                "tokens": row[key],
                "tokens_per_parameter": None if row[key] is None else row[key] / row["params"],
                "extrapolates": "yes" if row["extrapolates"][key] else "no",
            }
            for key, words in WORDS.items()
            for row in crossover.rows
        ],
        schema_overrides={"tokens": pl.Float64, "tokens_per_parameter": pl.Float64},
    )


def crossover_chart(rows: pl.DataFrame) -> Chart:
    """Draw tokens over parameters on two logarithms, a line per G and a column per kind."""
    groups = rows["group_size"].unique(maintain_order=True).to_list()
    colors = [f"theme:{GROUP_COLORS[i % len(GROUP_COLORS)]}" for i in range(len(groups))]
    power = alt.Axis(labelExpr="format(datum.value, '~e')", tickCount=6)
    stroke = alt.Legend(symbolType="stroke", symbolStrokeWidth=2.5, symbolSize=220)
    hue = alt.Scale(domain=groups, range=colors)
    lengths = alt.Scale(domain=list(WORDS.values()), range=[[6, 3], [1, 0]])
    base = inline(rows.drop_nulls("tokens")).encode(
        x=alt.X(
            "params:Q", title="parameters, N", axis=power, scale=alt.Scale(type="log", nice=False)
        ),
        y=alt.Y("tokens:Q", title="tokens, D", axis=power, scale=alt.Scale(type="log")),
        color=alt.Color("group_size:N", title=None, scale=hue, legend=stroke),
        tooltip=[
            alt.Tooltip("inputs:N"),
            alt.Tooltip("group_size:N", title="group size"),
            alt.Tooltip("params:Q", format=".3~s"),
            alt.Tooltip("tokens:Q", format=".2e"),
            alt.Tooltip("tokens_per_parameter:Q", title="tokens a parameter", format=",.0f"),
            alt.Tooltip("extrapolates:N"),
        ],
    )
    hollow = alt.condition("datum.extrapolates === 'yes'", alt.value(0), alt.value(1))
    points = base.mark_point(size=45, strokeWidth=1.5).encode(
        fill=alt.Fill("group_size:N", scale=hue, legend=None), fillOpacity=hollow
    )
    dash = alt.StrokeDash("inputs:N", title=None, scale=lengths, legend=stroke)
    return sized(base.mark_line(strokeWidth=2).encode(strokeDash=dash) + points, 380)
