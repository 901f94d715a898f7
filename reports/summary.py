"""Aggregate a run's tables to what a chart shows: a few hundred rows, whatever the run's size.

Frames in, frames out; no drawing, no words. Roles and blocks are the axes nearly everywhere:
a cell (role, block) holds every matching site (q, k and v; all experts), and stands for the worst.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl

from bitplan.formats import parse_format
from bitplan.reports.load import Run
from bitplan.sites import PLANNED_ROLES, ROLES, Linear, Site, describe

OPTIMAL, CHOSEN = "optimal", "plan"
LABEL_GAP = 0.035
MOST_POINTS = 1500
NAME_LENGTH = 80
TOKEN_LENGTH = 40


def shorten(name: str, length: int = NAME_LENGTH) -> str:
    """Return a name cut in the middle to at most `length` characters."""
    if len(name) <= length:
        return name
    half = (length - 3) // 2
    return f"{name[:half]}...{name[-half:]}"


def last_step(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of the last step recorded: the checkpoint itself in a profile."""
    return frame.filter(pl.col("step") == pl.col("step").max())


def role_rank(role: str) -> int:
    """Return where a role stands in every list and axis."""
    return ROLES.index(role) if role in ROLES else len(ROLES)


def sort_roles(roles: pl.Series) -> list[str]:
    """Return the distinct roles in the order of the network."""
    return sorted(roles.drop_nulls().unique().to_list(), key=lambda role: (role_rank(role), role))


def site_map(profile: pl.DataFrame, operand: str) -> pl.DataFrame:
    """Return one row a (role, block) of an operand: the site with the largest kurtosis.

    Columns: role, block (null outside blocks), kurtosis, site, sites (how many share the cell),
    absmax, max_over_rms, channel (strongest), token (text of the strongest, spelled visibly).
    """
    channel = pl.col("top_channels").list.get(0, null_on_oob=True).struct.field("channel")
    token = pl.col("top_tokens").list.get(0, null_on_oob=True).struct.field("text")
    return (
        last_step(profile)
        .filter(pl.col("operand") == operand, pl.col("kurtosis").is_not_null())
        .with_columns(channel.alias("channel"), token.alias("token"))
        .sort("kurtosis", "site", descending=[True, False])
        .group_by("role", "block", maintain_order=True)
        .agg(
            pl.col("kurtosis", "site", "absmax", "max_over_rms", "channel", "token").first(),
            pl.len().alias("sites"),
        )
        .with_columns(
            pl.col("site").map_elements(shorten, return_dtype=pl.String),
            pl.col("token").map_elements(visible, return_dtype=pl.String, skip_nulls=True),
        )
        .sort("block", "role", nulls_last=True)
    )


def visible(token: str) -> str:
    """Spell a token so that blanks and control characters can be seen."""
    return shorten(repr(token), TOKEN_LENGTH)


def format_errors(errors: pl.DataFrame, profile: pl.DataFrame, operand: str) -> pl.DataFrame:
    """Return role, format, low, median, high (dB over sites) and sites, for roles in blocks."""
    sites = last_step(profile).filter(pl.col("operand") == operand, pl.col("block").is_not_null())
    joined = last_step(errors).join(sites.select("site", "role"), on="site")
    return (
        joined.filter(pl.col("sqnr_db").is_not_null())
        .group_by("role", "format")
        .agg(
            pl.col("sqnr_db").min().alias("low"),
            pl.col("sqnr_db").median().alias("median"),
            pl.col("sqnr_db").max().alias("high"),
            pl.len().alias("sites"),
        )
        .sort(pl.col("role").map_elements(role_rank, return_dtype=pl.Int64), "role", "format")
    )


def lowest_format(formats: pl.Series) -> str | None:
    """Return the format with the fewest bits (the first by name among equals)."""
    names = sorted(formats.drop_nulls().unique().to_list(), key=lambda n: (parse_format(n).bits, n))
    return names[0] if names else None


def sensitivity_points(
    sensitivity: pl.DataFrame, profile: pl.DataFrame, number_format: str
) -> pl.DataFrame:
    """Return site, role, block, operand, kurtosis, delta_loss, method for one format.

    Where a site was measured by intervention, that value replaces the estimate.
    """
    best = (
        sensitivity.filter(pl.col("format") == number_format, pl.col("delta_loss").is_not_null())
        .sort("site", "method", descending=[False, True])  # "intervention" sorts after "gradient"
        .unique("site", keep="first", maintain_order=True)
    )
    kurtosis = last_step(profile).select("site", "role", "block", "operand", "kurtosis")
    return (
        best.join(kurtosis, on="site")
        .filter(pl.col("kurtosis").is_not_null())
        .select("site", "role", "block", "operand", "kurtosis", "delta_loss", "method")
        .sort("site")
    )


def thin_points(points: pl.DataFrame) -> pl.DataFrame:
    """Return at most MOST_POINTS: the extremes of both axes, and of the rest every so many-th.

    A mixture of many experts has tens of thousands of sites, more than a browser draws at ease.
    """
    if points.height <= MOST_POINTS:
        return points
    third = MOST_POINTS // 3
    extreme = pl.concat(
        [
            points.sort(pl.col(name).abs(), descending=True, maintain_order=True).head(third)
            for name in ("delta_loss", "kurtosis")
        ]
    ).unique(maintain_order=True)
    rest = points.join(extreme, on="site", how="anti", maintain_order="left")
    room = MOST_POINTS - extreme.height
    return pl.concat([extreme, rest.gather_every(-(-rest.height // room))])


def plan_sites(plan: dict[str, object]) -> pl.DataFrame:
    """Return site, operand, role, block, format, bits, delta_loss, reason, planned of a plan."""
    entries = plan.get("sites")
    rows = []
    for name, entry in (entries if isinstance(entries, dict) else {}).items():
        site = Site.parse(name)
        linear = describe([Linear(site.module, 1, 1)])[0]
        rows.append(
            {
                "site": name,
                "operand": site.operand,
                "role": entry.get("role") or linear.role,
                "block": entry.get("block", linear.block),
                "format": entry["format"],
                "bits": parse_format(entry["format"]).bits,
                "delta_loss": entry.get("delta_loss"),
                "reason": entry.get("reason"),
                "planned": entry.get("planned", linear.role in PLANNED_ROLES),
            }
        )
    schema = {
        "site": pl.String,
        "operand": pl.String,
        "role": pl.String,
        "block": pl.Int64,
        "format": pl.String,
        "bits": pl.Int64,
        "delta_loss": pl.Float64,
        "reason": pl.String,
        "planned": pl.Boolean,
    }
    return pl.DataFrame(rows, schema=schema)


def base_formats(sites: pl.DataFrame) -> dict[str, str]:
    """Return for each operand the format with the fewest bits among its planned sites."""
    bases = {}
    for operand in ("input", "weight"):
        mine = sites.filter(pl.col("operand") == operand, "planned")
        low = lowest_format(mine["format"])
        if low is not None:
            bases[operand] = low
    return bases


def raised_sites(sites: pl.DataFrame) -> pl.DataFrame:
    """Return the planned sites in more bits than their operand's base format."""
    bases = base_formats(sites)
    base_bits = {operand: parse_format(name).bits for operand, name in bases.items()}
    return sites.filter(
        "planned",
        pl.col("bits") > pl.col("operand").replace_strict(base_bits, return_dtype=pl.Int64),
    )


def plan_map(sites: pl.DataFrame, operand: str) -> pl.DataFrame:
    """Return one row a (role, block): the format of most bits, and how many sites have it.

    Columns: role, block, format, bits, sites, same (sites of that format), delta_loss (summed).
    """
    chosen = sites.filter(pl.col("operand") == operand, pl.col("block").is_not_null())
    return (
        chosen.sort("bits", "format", descending=[True, False])
        .group_by("role", "block", maintain_order=True)
        .agg(
            pl.col("format", "bits").first(),
            pl.len().alias("sites"),
            (pl.col("format") == pl.col("format").first()).sum().alias("same"),
            pl.col("delta_loss").sum(),
            pl.col("site").first().map_elements(shorten, return_dtype=pl.String),
        )
        .sort("block", "role")
    )


def frontier_points(frontier: pl.DataFrame, budget: str) -> pl.DataFrame:
    """Return the points of one budget: label, cost, value, measure, weight_bits, input_bits.

    The value is the predicted change of loss; without sensitivities, the objective in its stead.
    """
    points = frontier.filter(pl.col("budget") == budget, pl.col("cost").is_not_null())
    value, measure = "delta_loss", "predicted change of loss (nats per token)"
    if points["delta_loss"].is_null().all() and "objective" in points.columns:
        value, measure = "objective", "weighted relative error (no sensitivity was profiled)"
    return points.filter(pl.col(value).is_not_null()).select(
        "label",
        "cost",
        pl.col(value).alias("value"),
        pl.lit(measure).alias("measure"),
        "weight_bits",
        "input_bits",
        "plan_id",
    )


def chosen_point(points: pl.DataFrame, plan: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return cost and value of the plan on one budget's axis; None where it is not on it."""
    same = points.filter(pl.col("label") == CHOSEN)
    if same.is_empty() and plan is not None:
        same = points.filter(pl.col("plan_id") == plan.get("plan_id"))
    return None if same.is_empty() else same.select("cost", "value").row(0, named=True)


def rules(points: pl.DataFrame) -> pl.DataFrame:
    """Return the points that are rules' plans."""
    return points.filter(~pl.col("label").is_in([OPTIMAL, CHOSEN]))


def _range(values: pl.Series) -> float:
    known: list[float] = values.drop_nulls().to_list()
    return max(known) - min(known)


def merge_labels(points: pl.DataFrame) -> pl.DataFrame:
    """Return label, cost, value of the rules, names of points too close to tell apart joined."""
    span = {name: _range(points[name]) or 1.0 for name in ("cost", "value")}
    merged: list[dict[str, Any]] = []
    for row in rules(points).sort("cost", "value", "label").iter_rows(named=True):
        near = next(
            (
                m
                for m in merged
                if all(abs(m[name] - row[name]) < LABEL_GAP * span[name] for name in span)
            ),
            None,
        )
        if near is None:
            merged.append({name: row[name] for name in ("label", "cost", "value")})
        else:
            near["label"] += f", {row['label']}"
    schema = {"label": pl.String, "cost": pl.Float64, "value": pl.Float64}
    return pl.DataFrame(merged, schema=schema)


def role_kurtosis(run: Run, operand: str) -> pl.DataFrame:
    """Return role, median, high and calm (without the top tokens) over the blocks' sites."""
    assert run.profile is not None
    return (
        last_step(run.profile)
        .filter(
            pl.col("operand") == operand,
            pl.col("block").is_not_null(),
            pl.col("kurtosis").is_not_null(),
        )
        .group_by("role")
        .agg(
            pl.col("kurtosis").median().alias("median"),
            pl.col("kurtosis").max().alias("high"),
            pl.col("kurtosis_without_top_tokens").median().alias("calm"),
        )
        .sort("median", "role", descending=[True, False])
    )
