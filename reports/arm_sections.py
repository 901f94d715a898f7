"""The sections about trainings: curves, statistics while training, delta and R."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from bitplan.reports import arm_charts, arm_summary, summary, words
from bitplan.reports.figures import figure, missing
from bitplan.reports.load import Run
from bitplan.reports.markup import Markup, el
from bitplan.reports.sections import section, weights_note

STATS_ARMS = ("bf16", "w4a4", "planned")
TOLERANCE = (0.8, 1.25)


def training(run: Run, name: str) -> Markup:
    """Section 8: losses of the arms over tokens, and the inputs' kurtosis over steps."""
    lead = (
        "All arms start from the same weights and see the same batches, so their difference to "
        "bf16 is far more precise than the loss itself."
    )
    title = "Training"
    all_losses = arm_summary.losses(run.arms)
    drawn = []
    deltas = arm_summary.delta_curves(all_losses)
    if not deltas.is_empty():
        drawn.append(
            figure(
                name + "-delta",
                arm_charts.curves(deltas, "loss above bf16 (nats per token)", band=True),
                title="Loss above bf16",
                takeaway=words.deltas_in_training(deltas)
                + words.copies(arm_summary.copies(run.arms)),
                data=_ends(deltas),
            )
        )
    raw = arm_summary.loss_curves(all_losses)
    if not raw.is_empty():
        drawn.append(
            figure(
                name + "-loss",
                arm_charts.curves(raw, "training loss (nats per token)", band=False),
                title="Training loss",
                data=_ends(raw),
            )
        )
    stats = arm_summary.training_stats(run.arms)
    stats = stats.filter(pl.col("arm").is_in(STATS_ARMS))
    if not drawn and stats.is_empty():
        return section(name, title, lead, missing("Not trained yet:", f"bitplan verify {run.name}"))
    if not stats.is_empty():
        drawn.append(_stats(stats, name))
    return section(name, title, lead, *drawn)


def _ends(curves: pl.DataFrame) -> pl.DataFrame:
    """Return about ten rows an arm: enough to read a curve from."""
    every = pl.int_range(pl.len()).over("arm")
    last = pl.len().over("arm") - 1
    step = (last // 10).clip(lower_bound=1)
    return curves.filter((every % step == 0) | (every == last))


def _stats(stats: pl.DataFrame, name: str) -> Markup:
    roles = summary.sort_roles(stats["role"])
    low, high = stats["kurtosis"].min(), stats["kurtosis"].max()
    domain = [min(2.0, float(low)), float(high) * 1.2]  # type: ignore[arg-type]
    drawn = [
        figure(
            f"{name}-stats-{arm}",
            arm_charts.stats_lines(rows, roles, domain),
            title=arm,
            data=rows.drop("arm"),
        )
        for arm in STATS_ARMS
        if not (rows := stats.filter(pl.col("arm") == arm)).is_empty()
    ]
    return el(
        "div",
        el("h3", "Outliers while training"),
        el("p", words.stats(stats), class_="takeaway"),
        el("div", drawn, class_="trio"),
    )


def deltas(run: Run, name: str) -> Markup:
    """Section 9: delta by arm and R before and after, with intervals."""
    lead = (
        "delta is what an arm loses on held-out text against bf16 (same data, same seed). R is the "
        "delta of 4-bit inputs over that of 4-bit weights: at 1 the two errors are equal."
    )
    title = "Measured error"
    if run.verdict is None:
        return section(name, title, lead, missing("No verdict yet:", f"bitplan verify {run.name}"))
    drawn = []
    measured = {
        arm: value
        for arm, value in (run.verdict.get("delta") or {}).items()
        if arm != arm_summary.BASELINE and not arm_summary.is_spared(arm) and value is not None
    }
    intervals = _intervals(measured, "arm")
    if not intervals.is_empty():
        seeds = arm_summary.seed_deltas(run.arms)
        drawn.append(
            figure(
                name + "-arms",
                arm_charts.delta_chart(intervals, seeds),
                title="delta by arm",
                takeaway=words.delta(measured, (run.verdict.get("noise") or {}).get("floor")),
                data=intervals,
                note=weights_note(run),
            )
        )
    tolerance = tolerance_of(run.verdict)
    named = {
        "before (4 bits everywhere)": (run.verdict.get("R") or {}).get("before"),
        "after (planned)": (run.verdict.get("R") or {}).get("after"),
    }
    ratios = _intervals({k: v for k, v in named.items() if v}, "label")
    ratios = ratios.filter(pl.col("estimate") > 0)
    takeaway = words.ratio(run.verdict, tolerance)
    takeaway += words.predicted_ratio((run.plan or {}).get("predicted") or {})
    if ratios.is_empty():
        drawn.append(el("p", takeaway, class_="takeaway"))
    else:
        drawn.append(
            figure(
                name + "-ratio",
                arm_charts.ratio_chart(ratios, tolerance),
                title="R before and after the plan",
                takeaway=takeaway,
                data=ratios,
            )
        )
    given_back = arm_summary.attribution(run.verdict)
    if not given_back.is_empty():
        drawn.append(
            figure(
                name + "-attribution",
                arm_charts.attribution_chart(given_back),
                title="Where the error comes from",
                takeaway=words.attribution(given_back),
                data=given_back.drop("label"),
            )
        )
    return section(name, title, lead, *drawn)


def tolerance_of(verdict: Mapping[str, Any]) -> tuple[float, float]:
    """Return the band of R in which errors count as converged, the verdict's own if it says one."""
    match verdict.get("tolerance"):
        case [float() | int() as low, float() | int() as high]:
            return float(low), float(high)
        case {"low": low, "high": high}:
            return float(low), float(high)
        case _:
            return TOLERANCE


def _intervals(values: Mapping[str, Any], key: str) -> pl.DataFrame:
    rows = [
        {key: name} | {end: value.get(end) for end in ("estimate", "low", "high")}
        for name, value in values.items()
        if value.get("estimate") is not None
    ]
    numbers = dict.fromkeys(("estimate", "low", "high"), pl.Float64)
    return pl.DataFrame(rows, schema={key: pl.String, **numbers})
