"""Aggregate the trainings: losses and deltas over tokens, kurtosis over steps.

Frames in, frames out. Arms are compared at equal seed and step, as their data is the same there.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl

from bitplan.reports.load import Arm

BASELINE = "bf16"
ARM_ORDER = ("bf16", "w4a16", "w16a4", "w4a4", "planned")
CURVE_POINTS = 120
CURVE_WINDOWS = 20
STAT_STEPS = 60


def arm_rank(arm: str) -> tuple[int, str]:
    """Return where an arm stands in every list and axis."""
    known = ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER)
    return known, arm


def is_spared(arm: str) -> bool:
    """Return whether it is an attribution arm, `w4a4-fc2-input-8`: w4a4 but for one operand."""
    return arm.startswith("w4a4-") and arm.endswith(("-input-8", "-weight-8"))


def copies(arms: tuple[Arm, ...]) -> dict[str, str]:
    """Return the arms that quantize exactly as another does, and that other's name."""
    return {arm.name: str(arm.record["same_as"]) for arm in arms if arm.record.get("same_as")}


def losses(arms: tuple[Arm, ...]) -> pl.DataFrame:
    """Return arm, seed, step, tokens, loss of every training step.

    Copies of an arm and attribution arms are left out.
    """
    frames = [
        arm.metrics.select(
            pl.lit(arm.name).alias("arm"),
            pl.lit(arm.seed, pl.Int64).alias("seed"),
            "step",
            "tokens",
            "loss",
        )
        for arm in arms
        if arm.metrics is not None and not arm.record.get("same_as") and not is_spared(arm.name)
    ]
    schema = {
        "arm": pl.String,
        "seed": pl.Int64,
        "step": pl.Int64,
        "tokens": pl.Int64,
        "loss": pl.Float64,
    }
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)


def loss_curves(all_losses: pl.DataFrame) -> pl.DataFrame:
    """Return the loss of each arm over tokens: mean, low and high over its seeds, smoothed."""
    return _curves(all_losses.rename({"loss": "value"}))


def delta_curves(all_losses: pl.DataFrame) -> pl.DataFrame:
    """Return loss(arm) - loss(bf16) at equal seed and step: mean, low and high over the seeds."""
    baseline = all_losses.filter(pl.col("arm") == BASELINE)
    others = all_losses.filter(pl.col("arm") != BASELINE)
    joined = others.join(
        baseline.select("seed", "step", pl.col("loss").alias("baseline")), on=["seed", "step"]
    )
    return _curves(joined.with_columns((pl.col("loss") - pl.col("baseline")).alias("value")))


def _curves(values: pl.DataFrame) -> pl.DataFrame:
    """Smooth each (arm, seed) by a running mean, then take mean, low and high over seeds.

    Seeds that have not come as far as their arm's furthest are left out: a mean over fewer seeds
    halfway would look like a jump of the loss.
    """
    values = values.filter(pl.col("value").is_not_null()).sort("arm", "seed", "step")
    furthest = pl.col("step").max()
    values = values.filter(furthest.over("arm", "seed") == furthest.over("arm"))
    pieces = []
    for (_arm, _seed), curve in values.group_by("arm", "seed", maintain_order=True):
        window = max(1, curve.height // CURVE_WINDOWS)
        smooth = pl.col("value").rolling_mean(window, min_samples=1, center=True)
        pieces.append(_thin(curve.with_columns(smooth), CURVE_POINTS))
    if not pieces:
        return pl.DataFrame(
            schema={
                "arm": pl.String,
                "tokens": pl.Int64,
                "mean": pl.Float64,
                "low": pl.Float64,
                "high": pl.Float64,
                "seeds": pl.UInt32,
            }
        )
    value = pl.col("value")
    return (
        pl.concat(pieces)
        .group_by("arm", "tokens")
        .agg(
            value.mean().alias("mean"),
            value.min().alias("low"),
            value.max().alias("high"),
            pl.len().alias("seeds"),
        )
        .sort("arm", "tokens")
    )


def _thin(frame: pl.DataFrame, most: int) -> pl.DataFrame:
    """Return at most `most` rows, evenly spaced, the first and the last among them."""
    if frame.height <= most:
        return frame
    wanted = {round(i * (frame.height - 1) / (most - 1)) for i in range(most)}
    return frame[sorted(wanted)]


def training_stats(arms: tuple[Arm, ...]) -> pl.DataFrame:
    """Return arm, step, role and the median kurtosis of its inputs, over blocks and seeds."""
    frames = [
        arm.stats.filter(
            pl.col("operand") == "input",
            pl.col("block").is_not_null(),
            pl.col("kurtosis").is_not_null(),
        ).select(pl.lit(arm.name).alias("arm"), "step", "role", "kurtosis")
        for arm in arms
        if arm.stats is not None
    ]
    if not frames:
        return pl.DataFrame(
            schema={"arm": pl.String, "step": pl.Int64, "role": pl.String, "kurtosis": pl.Float64}
        )
    frame = pl.concat(frames)
    steps = _thin(frame.select("step").unique().sort("step"), STAT_STEPS)
    return (
        frame.join(steps, on="step")
        .group_by("arm", "step", "role")
        .agg(pl.col("kurtosis").median())
        .sort("arm", "role", "step")
    )


def attribution(verdict: Mapping[str, Any]) -> pl.DataFrame:
    """Return label, role, operand, estimate, low, high: what 8 bits give back of w4a4's delta.

    The operand of a role that gives back most comes first.
    """
    rows = [
        {"label": f"{role} {operand}s", "role": role, "operand": operand} | interval
        for role, entry in (verdict.get("attribution") or {}).items()
        for operand in ("input", "weight")
        if (interval := entry.get(operand)) and interval.get("estimate") is not None
    ]
    names = dict.fromkeys(("label", "role", "operand"), pl.String)
    numbers = dict.fromkeys(("estimate", "low", "high"), pl.Float64)
    frame = pl.DataFrame(rows, schema={**names, **numbers})
    return frame.sort("estimate", descending=True, maintain_order=True)


def seed_deltas(arms: tuple[Arm, ...]) -> pl.DataFrame:
    """Return arm and value: final held-out loss above bf16 of every single seed."""
    final = {
        (arm.name, arm.seed): loss
        for arm in arms
        if isinstance(loss := (arm.record.get("loss") or {}).get("heldout"), float)
    }
    rows = [
        {"arm": name, "seed": seed, "value": loss - final[BASELINE, seed]}
        for (name, seed), loss in final.items()
        if name != BASELINE and (BASELINE, seed) in final
    ]
    return pl.DataFrame(rows, schema={"arm": pl.String, "seed": pl.Int64, "value": pl.Float64})
