"""A figure: a chart, the sentence it supports, its data as a table, and a note where one is due."""

import polars as pl

from bitplan.reports.charts import Chart, to_spec
from bitplan.reports.markup import Markup, el, json_for_script, table
from bitplan.reports.numbers import number

TABLE_ROWS = 400


def figure(
    name: str,
    chart: Chart,
    *,
    title: str,
    takeaway: str = "",
    data: pl.DataFrame,
    note: str | None = None,
    columns: int | None = None,
) -> Markup:
    """Return a figure whose chart the page's script draws into the element called `name`.

    `columns` is how many columns of cells it has: few are kept narrow, many scroll on a phone.
    """
    width = None
    if columns is not None:
        width = f"min-width:{90 + 13 * columns}px;max-width:{max(440, 110 + 64 * columns)}px"
    return el(
        "figure",
        el("h3", title),
        el(
            "div",
            el("p", takeaway, class_="takeaway") if takeaway else None,
            el("p", note, class_="note", role="note") if note else None,
            class_="say",
        ),
        el(
            "div",
            el(
                "div",
                id=name,
                class_="chart",
                style=width,
                role="img",
                aria_label=f"{title}. {takeaway}",
            ),
            class_="wide",
        ),
        el("script", json_for_script(to_spec(chart)), type="application/json", data_chart=name),
        el("details", el("summary", "Show as table"), data_table(data), class_="data"),
    )


def data_table(frame: pl.DataFrame) -> Markup:
    """Return a frame as an HTML table, numbers shortened, at most TABLE_ROWS rows."""
    cut = frame.height - TABLE_ROWS
    rows = [[_cell(value) for value in row] for row in frame.head(TABLE_ROWS).iter_rows()]
    shown = table([name.replace("_", " ") for name in frame.columns], rows)
    return el("div", shown, el("p", f"{cut:,} more rows", class_="muted") if cut > 0 else None)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return number(value, 4) if isinstance(value, float) else str(value)


def missing(what: str, command: str) -> Markup:
    """Return the muted line that stands where a section has no data yet."""
    return el("p", f"{what} ", el("code", command), class_="missing")
