"""The sections of a run, in the order of the report; each a function from a run to HTML.

A section without data is one muted line that names the command to make it.
"""

import polars as pl

from bitplan.reports import charts, summary, words
from bitplan.reports.figures import figure, missing
from bitplan.reports.load import Run
from bitplan.reports.markup import Markup, el, table
from bitplan.reports.numbers import number

OPERANDS = ("input", "weight")
UNITS = {
    "input_bits": "average input bits",
    "weight_bits": "average weight bits",
    "bit_ops": "bit operations per token",
    "bytes": "bytes of weights",
    "time": "ms",
    "time_ms": "ms",
}
BLOCKS_BESIDE = 10
SITE_ROWS = 1000


def section(name: str, title: str, lead: str, *children: Markup | None) -> Markup:
    """Return a section with its heading, a sentence on what it is about, and its content."""
    return el(
        "section",
        el("h2", title),
        el("p", lead, class_="lead"),
        [child for child in children if child is not None],
        id=name,
    )


def outliers(run: Run, name: str) -> Markup:
    """Section 2: kurtosis of inputs and weights by block and role."""
    lead = (
        "Kurtosis says how heavy the tails of a tensor are: 3 for a normal distribution, more with "
        "outliers. One large value sets the scale of its whole group, and the others lose bits."
    )
    if run.profile is None:
        profile = missing("Not profiled yet:", f"bitplan profile MODEL -o {run.name}")
        return section(name, "Outlier map", lead, profile)
    cells = {operand: summary.site_map(run.profile, operand) for operand in OPERANDS}
    stops = charts.heat_stops([k for frame in cells.values() for k in frame["kurtosis"].to_list()])
    drawn = []
    beside = _fit_beside(run.profile["block"])
    for operand, frame in cells.items():
        inside = frame.filter(pl.col("block").is_not_null())
        if inside.is_empty():
            command = f"bitplan profile MODEL -o {run.name}"
            drawn.append(missing(f"No {operand}s in this profile:", command))
            continue
        # Side by side, both charts need the key, or their rows would not line up.
        legend = beside or operand == OPERANDS[0] or len(drawn) == 0
        peak = inside.sort("kurtosis", descending=True).row(0, named=True)
        drawn.append(
            figure(
                f"{name}-{operand}",
                charts.outlier_map(frame, stops, legend=legend),
                title=f"{operand.capitalize()}s",
                takeaway=words.outliers(summary.role_kurtosis(run, operand), peak, operand),
                data=frame,
                columns=inside["block"].n_unique(),
            )
        )
    return section(name, "Outlier map", lead, el("div", drawn, class_=_layout(beside)))


def _fit_beside(blocks: pl.Series) -> bool:
    """Whether two maps of these blocks fit beside each other."""
    return blocks.n_unique() <= BLOCKS_BESIDE


def _layout(beside: bool) -> str | None:
    return "pair" if beside else None


def errors(run: Run, name: str) -> Markup:
    """Section 4: signal over quantization noise by format and role."""
    lead = (
        "How well each tensor survives a format on its own: signal over quantization noise, "
        "6 dB a bit. Dots are the median site of a role, lines run from its worst to its best."
    )
    title = "Error by format"
    if run.errors is None or run.profile is None:
        command = f"bitplan profile MODEL -o {run.name}"
        return section(name, title, lead, missing("Not measured yet:", command))
    frames = {op: summary.format_errors(run.errors, run.profile, op) for op in OPERANDS}
    ends = [v for f in frames.values() for c in ("low", "high") for v in f[c].to_list()]
    drawn = [
        figure(
            f"{name}-{operand}",
            charts.error_chart(frame, [min(ends), max(ends)]),
            title=f"{operand.capitalize()}s",
            takeaway=words.errors(frame, operand),
            data=frame,
            note=weights_note(run) if operand == "weight" else None,
        )
        for operand, frame in frames.items()
        if not frame.is_empty()
    ]
    return section(name, title, lead, el("div", drawn, class_="pair"))


def weights_note(run: Run) -> str | None:
    """Return what must stand beside every weight error of this run; None where nothing must."""
    note = run.weights_note
    return (
        f"{note[0].upper()}{note[1:]}: read the weight error with that in mind." if note else None
    )


def sensitivity(run: Run, name: str) -> Markup:
    """Section 5: what kurtosis says against what quantizing a site costs."""
    lead = (
        "A heavy tail need not hurt: what counts is the loss. Each point is one tensor at the "
        "lowest format, its kurtosis against the loss that quantizing it alone costs."
    )
    title = "Sensitivity"
    points = None
    if run.sensitivity is not None and run.profile is not None:
        low = summary.lowest_format(run.sensitivity["format"])
        if low is not None:
            points = summary.sensitivity_points(run.sensitivity, run.profile, low)
    if points is None or points.is_empty():
        command = f"bitplan profile MODEL -o {run.name}"
        return section(
            name, title, lead, missing("Not measured yet (needs text, not only weights):", command)
        )
    top = points.sort("delta_loss", descending=True)
    shown = summary.thin_points(points)
    cut = (
        f" {shown.height:,} of {points.height:,} points are drawn."
        if shown.height < points.height
        else ""
    )
    drawn = figure(
        name + "-scatter",
        charts.sensitivity_scatter(shown),
        title=f"Kurtosis against loss at {low}",
        takeaway=words.sensitivity(points) + cut,
        data=top,
        note=weights_note(run) if "weight" in points["operand"] else None,
    )
    return section(name, title, lead, drawn)


def plan(run: Run, name: str) -> Markup:
    """Section 6: the formats by block and role, and the reasons."""
    lead = (
        "The format of every tensor. Numbers are bits; a cell shows the most any of its sites has."
    )
    title = "The plan"
    if run.plan is None:
        return section(
            name, title, lead, missing("No plan yet:", f"bitplan plan {run.name} --input-bits 5")
        )
    sites = summary.plan_sites(run.plan)
    inside = sites.filter(pl.col("block").is_not_null(), "planned")
    formats = inside["format"].unique().to_list()
    maps = []
    for operand in OPERANDS:
        cells = summary.plan_map(inside, operand)
        if cells.is_empty():
            continue
        maps.append(
            figure(
                f"{name}-{operand}",
                charts.plan_map(cells, formats),
                title=f"{operand.capitalize()}s",
                data=cells,
                columns=cells["block"].n_unique(),
            )
        )
    raised = summary.raised_sites(sites).sort(
        "delta_loss", "block", "site", descending=[True, False, False], nulls_last=True
    )
    tables = [
        _site_table(raised, f"Why: {words.plural(raised.height, 'site')} in more bits", shown=True),
        _site_table(sites, f"All {words.plural(sites.height, 'site')}", shown=False),
    ]
    return section(
        name,
        title,
        lead,
        el("p", words.plan(sites), class_="takeaway"),
        None if (said := words.advice(run.plan)) is None else el("p", said, class_="takeaway"),
        el("div", maps, class_=_layout(_fit_beside(inside["block"]))),
        *tables,
        el("ul", [el("li", note) for note in run.plan.get("notes") or ()], class_="notes"),
    )


def _site_table(sites: pl.DataFrame, title: str, *, shown: bool) -> Markup | None:
    if sites.is_empty():
        return None
    rows = [
        [el("code", row["site"]), row["format"], _loss(row["delta_loss"]), row["reason"] or ""]
        for row in sites.head(SITE_ROWS).iter_rows(named=True)
    ]
    if sites.height > SITE_ROWS:
        rows.append([f"{sites.height - SITE_ROWS:,} more in plan.json", "", "", ""])
    header = ["site", "format", "predicted loss", "reason"]
    content = table(header, rows, class_="sites")
    return el("details", el("summary", title), content, class_="sites", open=shown)


def _loss(value: float | None) -> str:
    return "" if value is None else number(value)


def frontier(run: Run, name: str) -> Markup:
    """Section 7: what every budget buys, and where rules and the plan stand."""
    lead = (
        "The best plan at every budget (line), plans by simple rules (diamonds), and this plan "
        "(ring). The nearer to the lower left, the better."
    )
    title = "Frontier"
    if run.frontier is None or run.frontier.is_empty():
        return section(name, title, lead, missing("No frontier yet:", f"bitplan plan {run.name}"))
    drawn: list[Markup] = []
    for budget in run.frontier["budget"].unique(maintain_order=True):
        points = summary.frontier_points(run.frontier, budget)
        if points.is_empty():
            continue
        chosen = summary.chosen_point(points, run.plan)
        unit = UNITS.get(budget, budget)
        drawn.append(
            figure(
                f"{name}-{len(drawn)}",
                charts.frontier(points, chosen, unit),
                title=f"{points['measure'][0].partition(' (')[0].capitalize()} over {unit}",
                takeaway=words.frontier(points, chosen, unit),
                data=points.drop("measure"),
            )
        )
    return section(name, title, lead, *drawn)
