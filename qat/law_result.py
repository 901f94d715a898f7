"""`bitplan law fit`: trainings to a law that `law predict` can use, and how far it holds.

Each precision that the trainings have is fitted on its own; the comparisons of the paper stand
beside: without D, without G, other forms by cross-validation, and whether the deltas of weights and
inputs add up to that of both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bitplan.errors import FitError
from bitplan.law import Baseline, Grid, Law, LawSet, write_laws
from bitplan.qat import law_fit
from bitplan.qat.law_fit import FORMS, Cells, Fit
from bitplan.qat.law_runs import BASELINE, deltas, facts, read_trainings
from bitplan.rundir import content_hash, file_hash, versions
from bitplan.tables import SWEEP

PRECISIONS = ("w4a4", "w4a16", "w16a4", "w4a4+fc2", "w16a4+fc2")
CONSTANTS = ("k", "gamma_n", "gamma_d", "gamma_g")


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    """The fits of all precisions, the comparisons, and the law made of them."""

    fits: Mapping[str, Fit]
    refused: Mapping[str, str]
    """Precision to why it could not be fitted."""
    forms: Mapping[str, Mapping[str, float | None]]
    """Precision to form to cross-validated relative error; None where it cannot be fitted."""
    additivity: tuple[float, float, float] | None
    baseline: Baseline | None
    trainings: int
    left_out: int
    grid: Mapping[str, Sequence[float]]
    written: Path | None = None

    def laws(self, source: str, provenance: Mapping[str, Any]) -> LawSet:
        """Return the fits as a law; raise FitError where bf16 could not be fitted."""
        if self.baseline is None:
            raise FitError(
                "a law needs the loss of bf16 as well: train bf16 at 3 or more values of N and of D"
            )
        return LawSet(
            source=source,
            baseline=self.baseline,
            laws={name: Law(**fit.estimate) for name, fit in self.fits.items()},
            grid=Grid(**{name: (low, high) for name, (low, high) in self.grid.items()}),
            intervals={
                name: {
                    c: (fit.low[c], fit.high[c])
                    for c in CONSTANTS
                    if math.isfinite(fit.low[c]) and math.isfinite(fit.high[c])
                }
                for name, fit in self.fits.items()
            },
            provenance=provenance,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the fits and comparisons as JSON values; null where an interval has no bound."""
        fits = {
            name: {
                "estimate": dict(fit.estimate),
                "low": {c: _finite(value) for c, value in fit.low.items()},
                "high": {c: _finite(value) for c, value in fit.high.items()},
                "relative_error": fit.relative_error,
                "cells": fit.cells,
            }
            for name, fit in self.fits.items()
        }
        return {
            "fits": fits,
            "refused": dict(self.refused),
            "cross_validated_relative_error": {k: dict(v) for k, v in self.forms.items()},
            "additivity": None
            if self.additivity is None
            else dict(zip(("estimate", "low", "high"), self.additivity, strict=True)),
            "baseline": None if self.baseline is None else asdict(self.baseline),
            "trainings": self.trainings,
            "left_out": self.left_out,
            "grid": {name: list(values) for name, values in self.grid.items()},
            "written": None if self.written is None else str(self.written),
        }

    def as_text(self) -> str:
        """Return the constants with intervals, the comparisons, and what was left out."""
        lines = [
            "delta = k D^gamma_D (log2 G)^gamma_G / N^gamma_N, nats per token; 95 % intervals",
            "",
            f"{'precision':12}" + "".join(f"{name:>27}" for name in CONSTANTS) + "   error  cells",
        ]
        for name, fit in self.fits.items():
            cells = "".join(
                f"{fit.estimate[c]:>9.4g} [{fit.low[c]:.4g}, {fit.high[c]:.4g}]".rjust(27)
                for c in CONSTANTS
            )
            lines.append(f"{name:12}{cells}{fit.relative_error:>8.1%}{fit.cells:>7}")
        lines += [f"{name:12} not fitted: {why}" for name, why in self.refused.items()]
        if self.forms:
            lines += ["", "Relative error on cells left out of the fit:"]
            lines.append(f"{'form':28}" + "".join(f"{name:>12}" for name in self.forms))
            for form in FORMS:
                errors = [self.forms[name][form.name] for name in self.forms]
                text = "".join(f"{'-' if e is None else f'{e:.1%}':>12}" for e in errors)
                lines.append(f"{form.name:28}{text}")
        if self.additivity is not None:
            c, low, high = self.additivity
            lines += ["", f"w4a4 = {c:.3f} [{low:.3f}, {high:.3f}] times (w4a16 + w16a4)"]
        if self.baseline is not None:
            b = self.baseline
            lines.append(
                f"bf16: L = {b.a:.4g} / N^{b.alpha:.4f} + {b.b:.4g} / D^{b.beta:.4f} + {b.e:.4f}"
            )
        lines += ["", f"{self.trainings:,} trainings; {self.left_out:,} arms are no row of the law"]
        if self.written is not None:
            lines += [
                f"wrote {self.written}",
                f"next: bitplan law predict --law {self.written} ...",
            ]
        return "\n".join(lines)


def fit_law(
    paths: Sequence[Path],
    output: Path | None = None,
    *,
    schedule: str | None = None,
    force: bool = False,
    branched: bool | None = None,
    bootstraps: int = law_fit.BOOTSTRAPS,
) -> FittedLaw:
    """Fit the law to trainings and, where `output` is given, write it as JSON.

    schedule: fit to those whose learning rate fell so alone. Raises FitError where no precision can
    be fitted, and what read_trainings raises.
    """
    trainings, left_out = read_trainings(paths, schedule=schedule, force=force, branched=branched)
    found = replace(fit_trainings(trainings, bootstraps=bootstraps), left_out=left_out)
    if output is None:
        return found
    kind = "" if trainings["trunk_tokens"].has_nulls() else "branched "
    source = f"{trainings.height} {kind}trainings of {', '.join(map(str, paths))}"
    write_laws(output, found.laws(source, _provenance(paths, trainings, schedule)))
    return replace(found, written=output)


def fit_trainings(trainings: pl.DataFrame, *, bootstraps: int = law_fit.BOOTSTRAPS) -> FittedLaw:
    """Fit the law to a table of trainings; raise FitError where no precision can be fitted."""
    differences = deltas(trainings)
    if differences["delta"].is_null().all():
        raise FitError(
            "no quantized training has a bf16 training of the same params, tokens and seed: "
            "train the arm bf16 beside it"
        )
    cells = {
        name: law_fit.cells_of(rows)
        for name in PRECISIONS
        if not (rows := differences.filter(precision=name)).is_empty()
    }
    if not cells:
        raise FitError(f"no training is of a precision of the law: {', '.join(PRECISIONS)}")
    fits, refused = _fit_all(cells, bootstraps)
    if not fits:
        raise FitError(next(iter(refused.values())))
    return FittedLaw(
        fits=fits,
        refused=refused,
        forms={name: _compare(cells[name]) for name in fits},
        additivity=_additivity(cells),
        baseline=_baseline(trainings),
        trainings=trainings.height,
        left_out=0,
        grid=facts(trainings),
    )


def _provenance(
    paths: Sequence[Path], trainings: pl.DataFrame, schedule: str | None
) -> dict[str, Any]:
    """Return what a law was fitted to: the tables by hash, and how their trainings were done."""
    tables = [path / SWEEP.file if path.is_dir() else path for path in paths]
    return {
        "tables": {str(path): file_hash(path) for path in tables if path.is_file()},
        "trainings": content_hash(sorted(trainings["config_hash"].drop_nulls())),
        "schedule": schedule,
        "branched": not trainings["trunk_tokens"].is_null().all(),
        "text": trainings["text"].drop_nulls().unique().sort().to_list(),
        "hardware": trainings["hardware"].drop_nulls().unique().sort().to_list(),
        "versions": dict(versions()),
    }


def _fit_all(cells: Mapping[str, Cells], bootstraps: int) -> tuple[dict[str, Fit], dict[str, str]]:
    fits, refused = {}, {}
    pairs = law_fit.pairs_of(list(cells.values()))
    for name, found in cells.items():
        try:
            fits[name] = law_fit.fit(found, bootstraps=bootstraps, pairs=pairs)
        except FitError as error:
            refused[name] = str(error)
    return fits, refused


def _compare(cells: Cells) -> dict[str, float | None]:
    errors: dict[str, float | None] = {}
    for form in FORMS:
        try:
            errors[form.name] = law_fit.cross_validate(cells, form)
        except FitError:
            errors[form.name] = None
    return errors


def _additivity(cells: Mapping[str, Cells]) -> tuple[float, float, float] | None:
    try:
        return law_fit.additivity(cells["w4a4"], cells["w4a16"], cells["w16a4"])
    except (KeyError, FitError):
        return None


def _baseline(trainings: pl.DataFrame) -> Baseline | None:
    rows = (
        trainings.filter(precision=BASELINE)
        .group_by("params", "tokens", maintain_order=True)
        .agg(pl.col("loss").mean())
    )
    numbers = [rows[name].cast(pl.Float64).to_numpy() for name in ("params", "tokens", "loss")]
    try:
        return law_fit.fit_baseline(*(np.asarray(n) for n in numbers))
    except FitError:
        return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
