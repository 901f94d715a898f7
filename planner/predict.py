"""From estimated and measured sensitivities to the numbers that a plan adds up.

A change of loss has two parts: the KL divergence from the unquantized predictions, which carries
over to other text, and a first-order part, delta_loss - kl. That of inputs carries over too, that
of weights is mostly this sample's noise (benchmarks/LOG.md). So the first-order part f of a weight,
with standard error s, is shrunk towards zero by its reliability. What it has beyond noise is taken
to spread in proportion to kl, by a factor rho per format:

    prediction = kl + c f,  c = (rho kl)^2 / ((rho kl)^2 + s^2),
    rho^2 = max(0, sum over sites of ((f/s)^2 - 1) / sum of (kl/s)^2)

Interventions calibrate: the median over measured sites of measured over estimated kl rescales the
estimates of an operand, the spread of that ratio is the estimates' own error, and a measured site
is its measurement and its estimate, weighted by precision (its standard error stays that of the
measurement, since both saw the same tokens).

The planner may still not pay for noise or be paid by it, so that what it minimizes is the largest
prediction among the format itself and all finer ones, and at least zero:

    objective(site, f) = max(0, max over g at least as fine as f of prediction(site, g))

`g` is finer than `f` if it has more bits per element, or is of the same kind and bits with smaller
groups. More bits are thus never predicted worse, and noise below zero ends as a tie (which goes to
fewer bits). Raw values stay beside the predictions, and a note counts those below zero.

Without sensitivities the planner minimizes the relative quantization error weighted by each site's
share of the multiply-accumulates (inputs) or parameters (weights): an order, not a loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bitplan.errors import PlanError
from bitplan.formats import Format
from bitplan.tables import ESTIMATE_SPREAD

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
PREFERRED = ("intervention", "gradient")
MIN_CALIBRATION = 3  # measured sites from which a ratio is taken
MAD_TO_STD = 1.4826


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
    """Return the objective for predictions `raw` [site, format]; NaN, not known, stays NaN."""
    finer = at_least_as_fine(formats)
    known = np.where(np.isnan(raw), -np.inf, raw)
    envelope = np.stack([known[:, finer[f]].max(axis=1) for f in range(len(formats))], axis=1)
    return np.where(np.isnan(raw), np.nan, np.maximum(envelope, 0.0))


def best_method(sensitivity: pl.DataFrame) -> pl.DataFrame:
    """Keep one row per (site, format): measured by intervention where there is one."""
    unknown = set(sensitivity["method"].unique()) - set(PREFERRED)
    if unknown:
        raise PlanError(f"sensitivity.parquet holds unknown methods {sorted(unknown)}")
    _check_finite(sensitivity)
    order = pl.col("method").replace_strict({m: i for i, m in enumerate(PREFERRED)})
    return (
        sensitivity.filter(pl.col("delta_loss").is_not_null())
        .sort(order, maintain_order=True)
        .unique(["site", "format"], keep="first", maintain_order=True)
    )


def _check_finite(sensitivity: pl.DataFrame) -> None:
    """Raise PlanError where a sensitivity is NaN or infinite; null is one that is not known."""
    numbers = pl.col("delta_loss", "stderr", "kl", "kl_stderr").is_finite().not_()
    if len(bad := sensitivity.filter(pl.any_horizontal(numbers))):
        site, name = bad.row(0)[:2]
        raise PlanError(
            f"sensitivity.parquet holds NaN or infinite values in {len(bad)} rows (the first: "
            f"{site} in {name}): they would spoil every sum; profile again, with other --data or "
            "--device"
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What quantizing each site is predicted to cost, [site, format], nats per token.

    `loss` may be below zero; `stderr` is its standard error, NaN where one is not known.
    """

    loss: Floats
    stderr: Floats
    kl: Floats
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Values:
    """The columns of one method as [site, format]."""

    delta_loss: Floats
    stderr: Floats
    kl: Floats
    kl_stderr: Floats


def predict(
    sensitivity: pl.DataFrame, sites: Sequence[str], is_input: Bools, formats: Sequence[Format]
) -> Prediction:
    """Return the prediction from the estimates and the measurements; is_input: [site]."""
    estimated, measured = (
        _Values(**{name: pivot(rows, name, sites, formats) for name in _Values.__annotations__})
        for rows in (sensitivity.filter(method=method) for method in PREFERRED[::-1])
    )
    shape = (len(sites), len(formats))
    loss, stderr, kl = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    notes = []
    for operand, mask in (("weights", ~is_input), ("inputs", is_input)):
        ratio, spread, count = _calibration(measured.kl[mask], estimated.kl[mask])
        if count >= MIN_CALIBRATION:
            notes.append(
                f"{operand}: estimates are multiplied by {ratio:.3g}, the median ratio of measured "
                f"to estimated KL over {count} measurements (spread {spread:.2g})"
            )
        for f in range(len(formats)):
            mine, theirs = _column(estimated, mask, f), _column(measured, mask, f)
            rho2 = np.inf if operand == "inputs" else _reliable_spread(mine)
            one, theirs_too = _shrunk(mine, rho2, ratio, spread), _shrunk(theirs, rho2, 1.0, 0.0)
            loss[mask, f], stderr[mask, f], kl[mask, f] = _combined(one, theirs_too)
    notes += _below_zero(sensitivity, sites)
    return Prediction(loss=loss, stderr=stderr, kl=kl, notes=tuple(notes))


def _column(values: _Values, mask: Bools, f: int) -> _Values:
    return _Values(**{name: getattr(values, name)[mask, f] for name in _Values.__annotations__})


def _calibration(measured: Floats, estimated: Floats) -> tuple[float, float, int]:
    """Return the median ratio of measured to estimated kl, its spread, and over how many sites."""
    both = (measured > 0) & (estimated > 0)
    ratios = measured[both] / estimated[both]
    if len(ratios) < MIN_CALIBRATION:
        return 1.0, ESTIMATE_SPREAD, len(ratios)
    ratio = float(np.median(ratios))
    return ratio, MAD_TO_STD * float(np.median(np.abs(ratios - ratio))), len(ratios)


def _reliable_spread(values: _Values) -> float:
    """Return rho^2: by how much first-order parts [sites] spread beyond noise, relative to kl."""
    known = (values.stderr > 0) & (values.kl > 0)
    s, kl = values.stderr[known], values.kl[known]
    first = values.delta_loss[known] - kl
    beyond = float(((first / s) ** 2 - 1).sum())
    return beyond / float(((kl / s) ** 2).sum()) if beyond > 0 else 0.0


def _shrunk(values: _Values, rho2: float, ratio: float, spread: float) -> tuple[Floats, ...]:
    """Return loss, its standard error and kl, [sites]; without kl the loss is taken as it is.

    rho2: infinite where nothing is shrunk.
    """
    split = ~np.isnan(values.kl)
    kl = values.kl * ratio
    noise = np.nan_to_num(values.stderr) ** 2
    c = np.ones_like(kl)
    if np.isfinite(rho2):
        systematic = rho2 * values.kl**2
        np.divide(systematic, systematic + noise, out=c, where=split & (noise > 0))
    variance = c * values.stderr**2 + np.nan_to_num(values.kl_stderr) ** 2 + (spread * kl) ** 2
    loss = np.where(split, kl + c * (values.delta_loss - values.kl), values.delta_loss)
    return loss, np.sqrt(np.where(split, variance, values.stderr**2)), kl


def _combined(estimated: tuple[Floats, ...], measured: tuple[Floats, ...]) -> tuple[Floats, ...]:
    """Weight both by precision where both are known; else take the one that is."""
    (loss, stderr, kl), (loss_too, stderr_too, kl_too) = estimated, measured
    comparable = np.isfinite(kl) & np.isfinite(kl_too) & (stderr > 0) & (stderr_too > 0)
    total = stderr**2 + stderr_too**2
    share = np.divide(stderr**2, total, out=np.ones_like(total), where=comparable)
    is_measured = ~np.isnan(loss_too)
    mixed = np.where(comparable, share * loss_too + (1 - share) * loss, loss_too)
    return (
        np.where(is_measured, mixed, loss),
        np.where(is_measured, stderr_too, stderr),
        np.where(is_measured, kl_too, kl),
    )


def _below_zero(sensitivity: pl.DataFrame, sites: Sequence[str]) -> list[str]:
    """Say how many changes of loss are below zero, and how many of them are no noise."""
    known = best_method(sensitivity).filter(pl.col("site").is_in(list(sites)))
    below = known.filter(pl.col("delta_loss") < 0)
    if below.is_empty():
        return []
    clear = len(below.filter(pl.col("delta_loss") + 2 * pl.col("stderr") < 0))
    said = f"{len(below) - clear} within two standard errors of zero, so noise"
    if clear:
        said += f", {clear} beyond: quantizing them helps on this text, and counts as free"
    return [f"{len(below)} of {len(known)} changes of loss are below zero: {said}"]


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
