"""The section on where the outliers are: tokens, channels, single values, single weights, experts.

Token texts come from whatever was profiled: they are spelled with `repr` and escaped as all text.
"""

import polars as pl

from bitplan import findings
from bitplan.reports import outlier_charts, outlier_summary, outlier_words, summary
from bitplan.reports.figures import data_table, figure, missing
from bitplan.reports.load import Run
from bitplan.reports.markup import Markup, el
from bitplan.reports.sections import section


def where(run: Run, name: str) -> Markup:
    """Section 3: which tokens, channels and weights the outliers are, and what experts saw."""
    title = "Where the outliers are"
    lead = (
        "Outliers that keep to a few tokens, channels or weights can be treated where they are; "
        "those that are everywhere need bits."
    )
    again = f"bitplan profile MODEL -o {run.name}"
    if run.profile is None:
        return section(name, title, lead, missing("Not profiled yet:", again))
    inputs = outlier_summary.distinct_inputs(run.profile)
    if inputs.is_empty():
        unknown = missing("No inputs in this profile, so no tokens and no channels:", again)
        return section(name, title, lead, unknown, _alignment(run.profile))
    return section(
        name,
        title,
        lead,
        _tokens(run, inputs, f"{name}-tokens"),
        _channels(inputs, f"{name}-channels"),
        *(
            (missing("Massive activations and super weights were not looked for:", again),)
            if run.outliers is None
            else (_massive(run.outliers), _super_weights(run.outliers))
        ),
        _alignment(run.profile),
        _routing(run.profile, f"{name}-routing"),
    )


def _tokens(run: Run, inputs: pl.DataFrame, name: str) -> Markup:
    found = outlier_summary.token_inputs(inputs, run.errors)
    strong = outlier_summary.strong_tokens(inputs)
    drawn = figure(
        name,
        outlier_charts.token_chart(outlier_summary.token_points(found)),
        title="Tokens",
        takeaway=outlier_words.tokens(found, inputs),
        data=found,
    )
    if strong.is_empty():
        return drawn
    said = el("h3", f"Strongest token of {inputs.height:,} inputs")
    return el("div", drawn, el("div", said, data_table(strong), class_="facts-table"))


def _channels(inputs: pl.DataFrame, name: str) -> Markup | None:
    roles = outlier_summary.channel_roles(inputs)
    cells = outlier_summary.channel_cells(inputs)
    if roles.is_empty() or cells.is_empty():
        return None
    residual = inputs.filter(
        pl.col("role").is_in(outlier_summary.RESIDUAL_ROLES), pl.col("expert").is_null()
    )
    drawn = figure(
        name,
        outlier_charts.channel_map(cells),
        title="Channels",
        takeaway=outlier_words.channels(cells, roles, residual.height),
        data=cells,
        columns=cells["block"].n_unique(),
    )
    said = el("h3", "Do the top 8 channels stay the same? Medians by role")
    return el("div", drawn, el("div", said, data_table(roles), class_="facts-table"))


def _massive(outliers: pl.DataFrame) -> Markup:
    found = findings.massive_channels(outliers)
    shown = found.with_columns(
        pl.col("blocks").map_elements(
            lambda blocks: findings.ranges(blocks.to_list()), return_dtype=pl.String
        ),
        pl.col("text").map_elements(summary.visible, return_dtype=pl.String, skip_nulls=True),
    )
    return _finding("Massive activations", outlier_words.massive(found), shown)


def _super_weights(outliers: pl.DataFrame) -> Markup:
    found = findings.super_weights(outliers)
    return _finding("Super-weight candidates", outlier_words.super_weights(found), found)


def _finding(title: str, said: str, shown: pl.DataFrame) -> Markup:
    content = None if shown.is_empty() else data_table(shown)
    return el("div", el("h3", title), el("p", said, class_="takeaway"), content, class_="finding")


def _alignment(profile: pl.DataFrame) -> Markup | None:
    found = outlier_summary.alignment(profile)
    if found.is_empty():
        return None
    said = outlier_words.alignment(found)
    table = el("details", el("summary", "Show as table"), data_table(found), class_="data")
    return el(
        "div",
        el("h3", "Gate and up rows"),
        el("p", said, class_="takeaway"),
        table,
        class_="finding",
    )


def _routing(profile: pl.DataFrame, name: str) -> Markup | None:
    experts = findings.routing(summary.last_step(profile))
    if experts.is_empty():
        return None
    return figure(
        name,
        outlier_charts.routing_map(experts),
        title="Experts",
        takeaway=outlier_words.routing(experts),
        data=experts,
        columns=experts["expert"].n_unique(),
    )
