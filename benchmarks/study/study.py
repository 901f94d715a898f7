"""The study's trainings: sweeps in, one Study per way of training out.

A sweep's rows are apart by how they were trained, from scratch or from a trunk (`trunk_tokens`) and
under which schedule, since their losses do not compare; of one way, several sweeps are one study.
A cell is an (N, D, G) of a precision; its delta is the mean over its seeds, and its noise that of
one training, pooled over all cells that have several seeds. Where none has, the noise is that of
the held-out text alone, which is smaller, and the document says so.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from kurtosis import FILE as KURTOSIS
from kurtosis import SCHEMA as KURTOSIS_SCHEMA
from scipy import stats

from bitplan.errors import FitError
from bitplan.law import FC2_AT_8
from bitplan.qat.law_fit import CONFIDENCE
from bitplan.qat.law_result import PRECISIONS, FittedLaw, fit_trainings
from bitplan.qat.law_runs import BASELINE, deltas, read_trainings, refuse_mixed
from bitplan.tables import RATIOS

PAIR = ("params", "tokens")
CELL = (*PAIR, "group_size")
TRUNK = "trunk_tokens"
COSINE, WSD = "cosine", "wsd"
WORDS = {
    "bf16": "BF16",
    "w4a4": "W4A4",
    "w4a16": "W4A16",
    "w16a4": "W16A4",
    "w4a4" + FC2_AT_8: "W4A4, FC2 input 8-bit",
    "w16a4" + FC2_AT_8: "W16A4, FC2 input 8-bit",
}


@dataclass(frozen=True)
class Noise:
    """How far the delta of one training scatters, as its standard deviation, nats per token."""

    std: float
    freedom: int
    """Degrees of freedom behind it; 0: no cell has several seeds, it is the held-out text's."""

    def half_width(self, seeds: int) -> float:
        """Return the half width of a cell's interval."""
        tail = (1 + CONFIDENCE) / 2
        quantile = stats.t.ppf(tail, self.freedom) if self.freedom else stats.norm.ppf(tail)
        return float(quantile * self.std / math.sqrt(seeds))


@dataclass(frozen=True)
class Study:
    """Trainings whose losses compare, their deltas and the law fitted to them."""

    branched: bool
    schedule: str | None
    trainings: pl.DataFrame
    """tables.SWEEP"""
    seeds: pl.DataFrame
    """law_runs.deltas: params, tokens, seed, group_size, precision, delta."""
    cells: pl.DataFrame
    """CELL, precision, delta, seeds, half: the half width of delta's interval."""
    noise: Noise
    fitted: FittedLaw | None
    refused: str
    """Why no law was fitted, where none was."""
    ratios: pl.DataFrame
    kurtosis: pl.DataFrame
    """The columns of kurtosis.parquet with those of its training."""

    @property
    def title(self) -> str:
        """How it was trained, in words."""
        return f"{'branched' if self.branched else 'from scratch'}, {self.schedule or 'unknown'}"

    def of(self, precision: str) -> pl.DataFrame:
        """Return the cells of a precision."""
        return self.cells.filter(precision=precision)

    def beside(self, *precisions: str) -> pl.DataFrame:
        """Return CELL and a delta per precision, of the cells that all of them have."""
        wide = self.of(precisions[0]).select(*CELL, pl.col("delta").alias(precisions[0]))
        for name in precisions[1:]:
            other = self.of(name).select(*CELL, pl.col("delta").alias(name))
            wide = wide.join(other, on=CELL, maintain_order="left")
        return wide


def read_studies(sweeps: Sequence[Path], *, bootstraps: int) -> list[Study]:
    """Return the studies of the sweeps' directories, from scratch under a cosine first."""
    trainings, _ = read_trainings(sweeps, force=True)
    ratios = _tables(sweeps, RATIOS.file, RATIOS.schema)
    kurtosis = _tables(sweeps, KURTOSIS, KURTOSIS_SCHEMA)
    apart = trainings.with_columns(branched=pl.col(TRUNK).is_not_null())
    found = [
        _study(part.drop("branched"), branched, schedule, ratios, kurtosis, bootstraps)
        for (branched, schedule), part in apart.group_by("branched", "schedule")
    ]
    return sorted(found, key=lambda s: (s.branched, s.schedule != COSINE, s.schedule or ""))


def _tables(sweeps: Sequence[Path], name: str, schema: dict[str, pl.DataType]) -> pl.DataFrame:
    """Return the rows of a file in all sweeps that have it; columns that a file lacks are null."""
    found = [pl.DataFrame(schema=schema)]
    for path in (sweep / name for sweep in sweeps):
        if path.is_file():
            table = pl.read_parquet(path)
            found.append(table.select(column for column in schema if column in table.columns))
    return pl.concat(found, how="diagonal")


def _study(
    trainings: pl.DataFrame,
    branched: bool,
    schedule: str | None,
    ratios: pl.DataFrame,
    kurtosis: pl.DataFrame,
    bootstraps: int,
) -> Study:
    refuse_mixed(trainings)
    seeds = deltas(trainings).filter(pl.col("delta").is_not_null())
    noise = _noise(trainings, seeds)
    cells = (
        seeds.group_by(*CELL, "precision", maintain_order=True)
        .agg(pl.col("delta").mean(), pl.len().alias("seeds"))
        .with_columns(half=pl.col("seeds").map_elements(noise.half_width, return_dtype=pl.Float64))
        .sort(pl.col("precision").replace_strict(PRECISIONS, range(len(PRECISIONS))), *CELL)
    )
    try:
        fitted, refused = fit_trainings(trainings, bootstraps=bootstraps), ""
    except FitError as error:
        fitted, refused = None, str(error)
    return Study(
        branched=branched,
        schedule=schedule,
        trainings=trainings,
        seeds=seeds,
        cells=cells,
        noise=noise,
        fitted=fitted,
        refused=refused,
        ratios=ratios.join(trainings.select("run").unique(), on="run"),
        kurtosis=kurtosis.join(
            trainings.select("run", "arm", "seed", *CELL, "precision"), on=["run", "arm", "seed"]
        ),
    )


def _noise(trainings: pl.DataFrame, seeds: pl.DataFrame) -> Noise:
    by_cell = seeds.group_by(*CELL, "precision").agg(
        pl.col("delta").var().alias("variance"), (pl.len() - 1).alias("freedom")
    )
    several = by_cell.filter(pl.col("freedom") > 0)
    freedom = int(several["freedom"].sum())
    if freedom:
        return Noise(_pooled(several), freedom)
    text = trainings.filter(pl.col("precision") != BASELINE)["stderr"].drop_nulls()
    return Noise(math.sqrt((text**2).mean()) if len(text) else math.nan, 0)


def _pooled(cells: pl.DataFrame) -> float:
    """Return the standard deviation of one training, from several cells' variances."""
    return math.sqrt((cells["variance"] * cells["freedom"]).sum() / cells["freedom"].sum())


def spread(study: Study) -> Iterator[dict[str, object]]:
    """Yield, per precision and N, how far seeds of one cell are apart, nats per token."""
    for (precision, params), rows in study.seeds.group_by(
        "precision", "params", maintain_order=True
    ):
        by_cell = (
            rows.group_by(*CELL)
            .agg(
                pl.col("delta").var().alias("variance"),
                (pl.col("delta").max() - pl.col("delta").min()).alias("range"),
                pl.col("delta").mean(),
                pl.len().alias("seeds"),
                (pl.len() - 1).alias("freedom"),
            )
            .filter(pl.col("freedom") > 0)
        )
        if by_cell.height:
            yield {
                "precision": precision,
                "params": params,
                "cells": by_cell.height,
                "seeds": int(by_cell["seeds"].sum()),
                "std": _pooled(by_cell),
                "widest": by_cell["range"].max(),
                "delta": by_cell["delta"].mean(),
            }
