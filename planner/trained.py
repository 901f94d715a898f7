"""From predicted to trained loss: what QAT leaves of it, by operand, as verify has measured it.

QAT repairs much of what quantization costs a checkpoint, and more of what weights cost than of what
inputs do, so a ratio of predictions is not the ratio after training. Each arm of verify that
quantizes one operand alone is a point (predicted, trained) in trained.parquet. Between two points
the trained loss is a power of the predicted one; beyond them it is in proportion to the nearest.
Points that noise put in the wrong order are put in order, each coordinate by itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from bitplan.errors import PlanError
from bitplan.formats import Operand
from bitplan.planner.predict import Floats
from bitplan.planner.problem import Problem
from bitplan.sites import OPERANDS


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Predicted and trained losses of one operand, nats per token, both ascending and above 0."""

    predicted: Floats
    trained: Floats

    def after(self, predicted: float) -> float:
        """Return the trained loss that a predicted one comes to."""
        return _power(predicted, self.predicted, self.trained)

    def before(self, trained: float) -> float:
        """Return the predicted loss that comes to a trained one."""
        return _power(trained, self.trained, self.predicted)


def _power(value: float, known: Floats, wanted: Floats) -> float:
    """Interpolate in logarithms; beyond the ends, in proportion to the nearest end."""
    if value <= known[0]:
        return float(value * wanted[0] / known[0])
    if value >= known[-1]:
        return float(value * wanted[-1] / known[-1])
    return float(np.exp(np.interp(np.log(value), np.log(known), np.log(wanted))))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The curves of both operands, and the trainings they stand on."""

    curves: Mapping[Operand, Curve]
    arms: int
    tokens: int

    def ratio(self, inputs: float, weights: float) -> float:
        """Return R after training from the predicted losses of inputs and of weights (above 0)."""
        return self.curves["input"].after(inputs) / self.curves["weight"].after(weights)


def read_trained(problem: Problem, trained: pl.DataFrame) -> Trained | None:
    """Return what the last recipe in trained.parquet says; None where an operand has no point.

    A row counts where the problem can price it (each format profiled and a candidate) and its delta
    is above 0. Raises PlanError where a row names sites of another checkpoint.
    """
    rows = trained.filter(pl.col("recipe") == trained["recipe"].last())
    found: dict[Operand, list[tuple[float, float]]] = {operand: [] for operand in OPERANDS}
    for row in rows.iter_rows(named=True):
        predicted = _predicted(problem, json.loads(row["formats"]))
        if predicted is not None and predicted > 0 and row["delta"] > 0:
            found[row["operand"]].append((predicted, row["delta"]))
    if not all(found.values()):
        return None
    curves = {}
    for operand, points in found.items():
        predicted, after = np.sort(points, axis=0).T
        curves[operand] = Curve(predicted=predicted, trained=after)
    return Trained(curves=curves, arms=sum(map(len, found.values())), tokens=rows.item(0, "tokens"))


def _predicted(problem: Problem, formats: Mapping[str, str]) -> float | None:
    """Return the predicted loss of an assignment; None where a format is no candidate."""
    row = {site.site: i for i, site in enumerate(problem.sites)}
    column = {str(fmt): f for f, fmt in enumerate(problem.formats)}
    if unknown := [site for site in formats if site not in row]:
        raise PlanError(
            f"trained.parquet names {unknown[0]}, which this checkpoint lacks: verify again, or "
            "remove the file"
        )
    if not set(formats.values()) <= set(column):
        return None
    at = [(row[site], column[fmt]) for site, fmt in formats.items()]
    total = float(sum(problem.objective[i, f] for i, f in at))
    return total if np.isfinite(total) else None
