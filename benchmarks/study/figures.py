"""The study's figures: cells to altair charts, drawn as the reports are, and charts to SVG files.

Points are cells with the interval of their noise (study.py), lines the fitted law. Logarithmic axes
cannot show what is not above 0: such cells are left out of the picture, never of a fit or a table,
and `hidden` counts them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl
import vl_convert
from claims import BOTH, INPUTS, MIDDLE, WEIGHTS
from study import CELL, WORDS, Study

from bitplan.law import FC2_AT_8, Baseline, Law
from bitplan.qat.verdict import fieller
from bitplan.reports import theme
from bitplan.reports.charts import SHAPES, SI_LABEL, inline
from bitplan.rundir import write_atomic

HUES = tuple(f"theme:{name}" for name in ("qkv", "o", "fc1", "fc2", "eight", "full"))
AXES = {
    "params": ("parameters, N", "N "),
    "tokens": ("training tokens, D", "D "),
    "group_size": ("group size, G", "G "),
}
ROLE_WORDS = {"qkv": "QKV", "o": "O", "fc1": "FC1", "fc2": "FC2"}
LINE_POINTS = 25


def write_svg(chart: Any, path: Path) -> None:
    """Write a chart as an SVG on light paper."""
    # Without labels of every mark for screen readers the files are half as large.
    config = theme.CONFIG | {"aria": False}
    spec = theme.resolve(chart.to_dict() | {"config": config}, theme.LIGHT)
    drawn = vl_convert.vegalite_to_svg(spec).encode()
    write_atomic(path, lambda file: file.write(drawn))


def short(value: float) -> str:
    """Write a number of parameters or tokens with three digits: 4.26M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def hidden(cells: pl.DataFrame) -> int:
    """Return how many cells a logarithmic axis cannot show."""
    return cells.filter(pl.col("delta") <= 0).height


def against(study: Study, axis: str) -> Any:
    """Draw delta over N, D or G, a panel per precision and a line per value of `split`.

    Over N and D at the G that most cells have, over G at the largest D.
    """
    split = "params" if axis != "params" else "tokens"
    cells = study.cells.filter(pl.col("delta") > 0)
    if axis == "group_size":
        cells = cells.filter(pl.col("tokens") == pl.col("tokens").max().over("params", "precision"))
    else:
        cells = cells.filter(pl.col("group_size") == common_group(study))
    rows = [
        *_points(cells, axis, split),
        *(_law_lines(study, cells, axis, split) if study.fitted else ()),
    ]
    values = sorted({row["split_value"] for row in rows})
    keys = [_key(split, v) for v in values]
    hue, shape = _keyed(keys)
    base = inline(pl.DataFrame(rows, infer_schema_length=None)).encode(x=_log_x(axis), color=hue)
    is_cell = alt.datum.kind == "cell"
    y = alt.Y("delta:Q", title="delta, nats per token", scale=alt.Scale(type="log"))
    layers = alt.layer(
        base.transform_filter(alt.datum.kind == "law").mark_line(strokeWidth=1.5).encode(y=y),
        base.transform_filter(is_cell).mark_rule(strokeWidth=1).encode(y="low:Q", y2="high:Q"),
        base.transform_filter(is_cell).mark_point(filled=True, size=45).encode(y=y, shape=shape),
    ).properties(width=230, height=190)
    names = [WORDS[p] for p in WORDS if p in set(cells["precision"])]
    return layers.facet(
        facet=alt.Facet("precision:N", title=None, sort=names, header=_header()), columns=3
    )


def common_group(study: Study) -> int:
    """Return the G that most cells have."""
    return int(study.cells["group_size"].value_counts().sort("count", "group_size")[-1, 0])


def _points(cells: pl.DataFrame, axis: str, split: str) -> list[dict[str, Any]]:
    return [
        {
            "kind": "cell",
            "precision": WORDS[row["precision"]],
            "x": float(row[axis]),
            "delta": row["delta"],
            # The axis is logarithmic: an interval that reaches 0 is cut at a third of its cell.
            "low": max(row["delta"] - row["half"], row["delta"] / 3),
            "high": row["delta"] + row["half"],
            "key": _key(split, row[split]),
            "split_value": float(row[split]),
        }
        for row in cells.filter(pl.col("half").is_finite()).iter_rows(named=True)
    ]


def _law_lines(study: Study, cells: pl.DataFrame, axis: str, split: str) -> list[dict[str, Any]]:
    assert study.fitted is not None
    rows = []
    for (precision, value), of in cells.group_by("precision", split, maintain_order=True):
        fit = study.fitted.fits.get(str(precision))
        if fit is None or of[axis].n_unique() < 2:
            continue
        law = Law(**fit.estimate)
        first = of.row(0, named=True)
        for x in np.geomspace(of[axis].min(), of[axis].max(), LINE_POINTS):
            at = {name: float(first[name]) for name in CELL} | {axis: float(x)}
            rows.append(
                {
                    "kind": "law",
                    "precision": WORDS[str(precision)],
                    "x": float(x),
                    "delta": law.delta(**at),
                    "key": _key(split, float(value)),
                    "split_value": float(value),
                }
            )
    return rows


def predicted(study: Study) -> Any:
    """Draw what the fitted law says of each cell over what was measured."""
    assert study.fitted is not None
    rows = [
        {
            "precision": WORDS[name],
            "actual": row["delta"],
            "predicted": Law(**fit.estimate).delta(*(float(row[c]) for c in CELL)),
        }
        for name, fit in study.fitted.fits.items()
        for row in study.of(name).filter(pl.col("delta") > 0).iter_rows(named=True)
    ]
    hue, shape = _keyed([WORDS[name] for name in study.fitted.fits], "precision")
    return _diagonal(
        pl.DataFrame(rows), ("actual", "measured delta"), ("predicted", "predicted delta"), 1.0,
        color=hue, shape=shape,
    )  # fmt: skip


def added(study: Study) -> Any:
    """Draw delta of W4A4 over the sum of its parts, with the line of the additivity factor."""
    wide = study.beside(BOTH, WEIGHTS, INPUTS).with_columns(
        total=pl.col(WEIGHTS) + pl.col(INPUTS), key=pl.lit("G ") + pl.col("group_size").cast(str)
    )
    groups = wide.sort("group_size")["key"].unique(maintain_order=True).to_list()
    rows = wide.filter(pl.col("total") > 0, pl.col(BOTH) > 0).select("total", "key", both=BOTH)
    hue, shape = _keyed(groups)
    factor = study.fitted.additivity if study.fitted is not None else None
    return _diagonal(
        rows,
        ("total", "delta of W4A16 + delta of W16A4"),
        ("both", "delta of W4A4"),
        factor[0] if factor else 1.0,
        color=hue,
        shape=shape,
    )


def _diagonal(
    rows: pl.DataFrame, x: tuple[str, str], y: tuple[str, str], factor: float, **encodings: Any
) -> Any:
    ends = [min(rows[x[0]].min(), rows[y[0]].min()), max(rows[x[0]].max(), rows[y[0]].max())]
    line = pl.DataFrame({x[0]: ends, y[0]: [factor * end for end in ends]})
    scale = alt.Scale(type="log", nice=False)
    encoded = {
        "x": alt.X(f"{x[0]}:Q", title=x[1] + ", nats", scale=scale),
        "y": alt.Y(f"{y[0]}:Q", title=y[1] + ", nats", scale=scale),
    }
    points = inline(rows).mark_point(filled=True, size=40).encode(**encoded, **encodings)
    rule = inline(line).mark_line(color="theme:faint", strokeDash=[5, 3]).encode(**encoded)
    return (rule + points).properties(width=420, height=320)


def ratios(study: Study) -> pl.DataFrame:
    """Return R of every cell with and without FC2's inputs at 8 bits, by the study's noise."""
    rows = []
    for fc2, words in ((False, "all inputs at 4 bits"), (True, "FC2 inputs at 8 bits")):
        inputs = INPUTS + FC2_AT_8 * fc2
        for row in study.beside(WEIGHTS, inputs).iter_rows(named=True):
            found = fieller(row[WEIGHTS], row[inputs], _shared(study, row))
            rows.append(
                {**{c: row[c] for c in CELL}, "inputs": words, "R": found.estimate}
                | {"low": found.low, "high": found.high}
            )
    schema = dict.fromkeys(CELL, pl.Int64) | {"inputs": pl.String}
    return pl.DataFrame(
        rows, schema=schema | dict.fromkeys(("R", "low", "high"), pl.Float64)
    ).with_columns(per_parameter=pl.col("tokens") / pl.col("params"))


def _shared(study: Study, row: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return squared half widths of two deltas of a cell, which share the noise of their bf16."""
    seeds = study.of(WEIGHTS).filter(**{c: row[c] for c in CELL})["seeds"][0]
    return study.noise.half_width(int(seeds)) ** 2 * np.array([[1.0, 0.5], [0.5, 1.0]])


def ratio_chart(study: Study) -> Any:
    """Draw R over D/N, a column with and one without FC2's inputs at 8 bits, a color per N."""
    rows = ratios(study).filter(pl.col("group_size") == common_group(study), pl.col("R") > 0)
    rows = rows.with_columns(
        low=pl.max_horizontal("low", pl.col("R") / 3).fill_null(pl.col("R")),
        high=pl.min_horizontal("high", pl.col("R") * 3).fill_null(pl.col("R")),
        key=pl.col("params").map_elements(lambda n: _key("params", n), return_dtype=pl.String),
    )
    keys = rows.sort("params")["key"].unique(maintain_order=True).to_list()
    hue, shape = _keyed(keys)
    y = alt.Y("R:Q", title="R", scale=alt.Scale(type="log", nice=False))
    base = inline(rows.drop("params", "tokens", "group_size")).encode(
        x=alt.X(
            "per_parameter:Q",
            title="tokens per parameter, D/N",
            scale=alt.Scale(type="log", nice=False, padding=12),
        ),
        color=hue,
    )
    layers = alt.layer(
        base.mark_line(strokeWidth=1).encode(y=y),
        base.mark_rule(strokeWidth=1).encode(y="low:Q", y2="high:Q"),
        base.mark_point(filled=True, size=45).encode(y=y, shape=shape),
        _level(base, 1.0),
    ).properties(width=300, height=220)
    names = rows["inputs"].unique(maintain_order=True).to_list()
    return layers.facet(facet=alt.Facet("inputs:N", title=None, sort=names, header=_header()))


def kurtosis_chart(study: Study) -> Any:
    """Draw kurtosis by role and precision at the last record, a point per training."""
    rows = (
        study.kurtosis.filter(at="last")
        .filter((pl.col("group_size") == MIDDLE) | pl.col("group_size").is_null())
        .select("role", "kurtosis", "precision")
        .with_columns(
            pl.col("role").replace_strict(ROLE_WORDS),
            precision=pl.col("precision").replace_strict(WORDS),
        )
    )
    names = [w for w in WORDS.values() if w in set(rows["precision"])]
    hue, shape = _keyed(names, "precision")
    roles = list(ROLE_WORDS.values())
    base = inline(rows).encode(
        x=alt.X("role:N", title="input of", sort=roles, axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("precision:N", sort=names),
        y=alt.Y("kurtosis:Q", title="kurtosis", scale=alt.Scale(type="log", nice=False)),
        color=hue,
    )
    return alt.layer(
        base.mark_point(size=25, strokeWidth=1).encode(shape=shape),
        base.mark_tick(thickness=2, size=12).encode(y="median(kurtosis):Q"),
    ).properties(width=520, height=260)


def effective(study: Study, baseline: Baseline) -> pl.DataFrame:
    """Return the effective parameter multiplier of every cell whose delta is above 0."""
    rows = [
        {
            **{name: row[name] for name in (*CELL, "precision", "delta")},
            "multiplier": baseline.multiplier(float(row["params"]), max(row["delta"], 0.0)),
        }
        for row in study.cells.iter_rows(named=True)
    ]
    return pl.DataFrame(rows)


def effective_chart(study: Study, baseline: Baseline) -> Any:
    """Draw the effective parameter multiplier over D, a panel per precision, a color per N."""
    found = effective(study, baseline).filter(pl.col("group_size") == common_group(study))
    rows = found.select(
        precision=pl.col("precision").replace_strict(WORDS),
        x=pl.col("tokens").cast(pl.Float64),
        multiplier="multiplier",
        key=pl.col("params").map_elements(lambda n: _key("params", n), return_dtype=pl.String),
    )
    keys = [_key("params", n) for n in found["params"].unique().sort()]
    hue, shape = _keyed(keys)
    y = alt.Y("multiplier:Q", title="worth of a parameter", axis=alt.Axis(format="%"))
    base = inline(rows).encode(x=_log_x("tokens"), color=hue)
    layers = alt.layer(
        base.mark_line(strokeWidth=1).encode(y=y),
        base.mark_point(filled=True, size=45).encode(y=y, shape=shape),
        _level(base, 0.5),
    ).properties(width=230, height=170)
    names = [WORDS[p] for p in WORDS if WORDS[p] in set(rows["precision"])]
    return layers.facet(
        facet=alt.Facet("precision:N", title=None, sort=names, header=_header()), columns=3
    )


def _level(base: alt.Chart, value: float) -> alt.Chart:
    """Return a dashed line across the panel. Of the same data, as only that is cut into panels."""
    return base.mark_rule(strokeDash=[5, 3], strokeWidth=1).encode(
        y=alt.datum(value),
        x=alt.value(0),
        x2=alt.value("width"),
        color=alt.value("theme:faint"),
    )


def _key(split: str, value: float) -> str:
    return AXES[split][1] + short(value)


def _keyed(keys: Sequence[str], field: str = "key") -> tuple[alt.Color, alt.Shape]:
    """Return color and shape of a line or point: neither is relied on alone."""
    hues = [HUES[i % len(HUES)] for i in range(len(keys))]
    shapes = [SHAPES[i % (len(SHAPES) - 1)] for i in range(len(keys))]
    legend = alt.Legend(columns=6)
    return (
        alt.Color(
            f"{field}:N", title=None, sort=keys, legend=legend,
            scale=alt.Scale(domain=list(keys), range=hues),
        ),
        alt.Shape(
            f"{field}:N", title=None, sort=keys, legend=legend,
            scale=alt.Scale(domain=list(keys), range=shapes),
        ),
    )  # fmt: skip


def _log_x(axis: str) -> alt.X:
    return alt.X(
        "x:Q",
        title=AXES[axis][0],
        scale=alt.Scale(type="log", nice=False, padding=10),
        axis=alt.Axis(labelExpr=SI_LABEL, tickCount=4, labelOverlap="greedy", labelSeparation=6),
    )


def _header() -> alt.Header:
    return alt.Header(labelFontSize=13, labelColor="theme:ink")
