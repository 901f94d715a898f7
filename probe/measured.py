"""What a profile measures by intervention: the most uncertain estimates first, and their rows.

Measured on the tokens of the estimate, an intervention does not take away the sample's noise, which
both share, but the estimate's own error: what a Taylor step leaves out, about a fifth of kl, and
the noise of drawn labels. So that, in nats, is the order. What hardly costs anything, as most
8-bit formats, is thus measured last: it is clear without that it is better.

The unit is what a plan decides on: a weight, or an input with all of the fused linears that read it
(q/k/v; gate and up), which are quantized together. As with the gradient, each of them then gets an
equal share of the effect, so that the rows of a group add up to what was measured.

sensitivity.parquet itself is the record of what is done: rows are added to it as they come, and
what is in it is not measured again. A kill loses those of the pass in progress, eight at the most.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import polars as pl

from bitplan.formats import parse_format
from bitplan.probe.interventions import Effect, Intervention
from bitplan.sites import PLANNED_ROLES, Site
from bitplan.tables import ESTIMATE_SPREAD, SENSITIVITY

Count = int | Literal["all"]
METHOD = "intervention"
_UNIT = ("unit", "operand", "format")


def to_measure(
    profile: pl.DataFrame, sensitivity: pl.DataFrame, count: Count
) -> list[Intervention]:
    """Return those of the `count` interventions of the least certain estimates not yet measured.

    A number counts the roles that plans quantize alone; "all" takes lm_head too.
    """
    own = pl.when(operand="input").then("fused")
    sites = profile.select("site", "role", "operand", unit=pl.coalesce(own, "module"))
    rows = sensitivity.join(sites, on="site", maintain_order="left")
    quantized = [name for name in rows["format"].unique() if parse_format(name).is_quantized]
    estimates = (
        rows.filter(pl.col("method") == "gradient", pl.col("format").is_in(quantized))
        .group_by(_UNIT, maintain_order=True)
        .agg(pl.col("kl", "kl_stderr").sum(), pl.col("role").first(), "site")
        .sort(_uncertainty(), descending=True, maintain_order=True)
    )
    planned = estimates.filter(pl.col("role").is_in(PLANNED_ROLES))
    chosen = estimates if count == "all" else planned.head(count)
    left = chosen.join(rows.filter(method=METHOD), on=_UNIT, how="anti", maintain_order="left")
    return [
        Intervention(
            f"{row['unit']}:{row['operand']}={row['format']}",
            {Site.parse(site): parse_format(row["format"]) for site in row["site"]},
        )
        for row in left.to_dicts()
    ]


def _uncertainty() -> pl.Expr:
    """Return the error of an estimate of kl that measuring it would take away, in nats."""
    return ((ESTIMATE_SPREAD * pl.col("kl")).pow(2) + pl.col("kl_stderr").pow(2)).sqrt()


def with_effects(sensitivity: pl.DataFrame, effects: Sequence[Effect]) -> pl.DataFrame:
    """Return tables.SENSITIVITY with the rows of these effects added."""
    added = SENSITIVITY.frame(row for effect in effects for row in _rows(effect))
    return pl.concat([sensitivity, added], how="diagonal").select(*SENSITIVITY.schema)


def _rows(effect: Effect) -> Iterator[dict[str, Any]]:
    formats = effect.intervention.formats
    names = ("delta_loss", "stderr", "kl", "kl_stderr", "last_layer_error")
    values = {name: getattr(effect, name) for name in names}
    shares = {k: None if v is None else v / len(formats) for k, v in values.items()}
    for site, fmt in formats.items():
        yield {"site": str(site), "format": fmt.name, "method": METHOD, **shares}
