"""From measured sensitivities to the numbers that a plan adds up.

Measured changes of loss are noisy: many are below zero, and an 8-bit value can lie above the 4-bit
one. Taken as they are, the planner would pay for noise or be paid by it. So a prediction is the
largest measured value among the format itself and all finer ones, and at least zero:

    prediction(site, f) = max(0, max over g at least as fine as f of measured(site, g))

`g` is finer than `f` if it has more bits per element, or is of the same kind and bits with smaller
groups. More bits are thus never predicted worse, noise below zero ends as a tie (which goes to
fewer bits), and a true cost is never made smaller. Raw values stay beside the predictions.

Without sensitivities the planner minimizes the relative quantization error weighted by each site's
share of the multiply-accumulates (inputs) or parameters (weights): an order, not a loss.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bitplan.errors import PlanError
from bitplan.formats import Format

Floats = NDArray[np.float64]
PREFERRED = ("intervention", "gradient")


def at_least_as_fine(formats: Sequence[Format]) -> NDArray[np.bool_]:
    """Return [format, format]: whether the second is at least as fine as the first."""
    return np.array([[_finer(g, f) for g in formats] for f in formats], dtype=bool)


def _finer(g: Format, f: Format) -> bool:
    if g == f or g.bits > f.bits:
        return True
    return (g.kind, g.bits) == (f.kind, f.bits) and _scope(g) < _scope(f)


def _scope(f: Format) -> float:
    """How many elements share a scale: a group, a whole row, a whole tensor."""
    row, tensor = 2.0**62, 2.0**63
    return f.group_size or (tensor if f.granularity == "tensor" else row)


def denoise(raw: Floats, formats: Sequence[Format]) -> Floats:
    """Return predictions for measurements `raw` [site, format]; NaN, not measured, stays NaN."""
    finer = at_least_as_fine(formats)
    known = np.where(np.isnan(raw), -np.inf, raw)
    envelope = np.stack([known[:, finer[f]].max(axis=1) for f in range(len(formats))], axis=1)
    return np.where(np.isnan(raw), np.nan, np.maximum(envelope, 0.0))


def best_method(sensitivity: pl.DataFrame) -> pl.DataFrame:
    """Keep one row per (site, format): measured by intervention where there is one."""
    unknown = set(sensitivity["method"].unique()) - set(PREFERRED)
    if unknown:
        raise PlanError(f"sensitivity.parquet holds unknown methods {sorted(unknown)}")
    order = pl.col("method").replace_strict({m: i for i, m in enumerate(PREFERRED)})
    return (
        sensitivity.filter(pl.col("delta_loss").is_not_null())
        .sort(order, maintain_order=True)
        .unique(["site", "format"], keep="first", maintain_order=True)
    )


def pivot(
    frame: pl.DataFrame, column: str, sites: Sequence[str], formats: Sequence[Format]
) -> Floats:
    """Return one column of a (site, format) table as [site, format], NaN where it has no row."""
    row = {site: i for i, site in enumerate(sites)}
    col = {str(f): i for i, f in enumerate(formats)}
    out = np.full((len(sites), len(formats)), np.nan)
    for site, name, value in frame.select("site", "format", column).iter_rows():
        if site in row and name in col and value is not None:
            out[row[site], col[name]] = value
    return out


def pivot_methods(
    frame: pl.DataFrame, sites: Sequence[str], formats: Sequence[Format]
) -> NDArray[Any]:
    """Return the method of each measurement as [site, format] of str or None."""
    index = PREFERRED.index
    numbers = frame.with_columns(
        pl.col("method").map_elements(index, return_dtype=pl.Int64).alias("method")
    )
    table = pivot(numbers, "method", sites, formats)
    names = [[None if math.isnan(v) else PREFERRED[int(v)] for v in row] for row in table.tolist()]
    return np.array(names, dtype=object).reshape(len(sites), len(formats))
