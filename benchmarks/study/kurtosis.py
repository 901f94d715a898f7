"""Condense what a sweep recorded of kurtosis into one small table, SWEEP/kurtosis.parquet.

    python benchmarks/study/kurtosis.py SWEEP...

A row is a role of an arm at its first or its last record: the median over the layers of the
kurtosis of the linears' inputs. Joined to sweep.parquet by run, arm and seed it says which N, D, G
and precision it is of. Rows whose run directories are gone stay, so that a sweep that was trained
in parts is condensed in parts. Needs polars and nothing else.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import polars as pl

FILE = "kurtosis.parquet"
KEY = ("run", "arm", "seed", "role", "at")
SCHEMA = {
    "run": pl.String,
    "arm": pl.String,
    "seed": pl.Int64,
    "role": pl.String,
    "at": pl.String,  # `first` or `last`: which of the arm's records
    "step": pl.Int64,
    "sites": pl.Int64,  # linears that the median is over
    "kurtosis": pl.Float64,
}
ROLES = ("qkv", "o", "fc1", "fc2")


def condense(sweep: Path) -> pl.DataFrame:
    """Return the rows of a sweep's directory: of its arms, and those that were there before."""
    frames = [pl.DataFrame(schema=SCHEMA), *_arms(sweep)]
    if (sweep / FILE).is_file():
        frames.append(pl.read_parquet(sweep / FILE).select(*SCHEMA))
    return pl.concat(frames).unique(KEY, keep="first", maintain_order=True).sort(KEY)


def _arms(sweep: Path) -> Iterator[pl.DataFrame]:
    # An arm is finished when its record is there.
    for record in sorted(sweep.glob("runs/*/arms/*/seed-*/record.json")):
        seed, arm = record.parent, record.parents[1]
        stats = pl.read_parquet(
            record.with_name("stats.parquet"), columns=["operand", "role", "step", "kurtosis"]
        ).filter(
            pl.col("operand") == "input",
            pl.col("role").is_in(ROLES),
            pl.col("kurtosis").is_not_null(),
        )
        for at, step in (("first", stats["step"].min()), ("last", stats["step"].max())):
            yield (
                stats.filter(step=step)
                .group_by("role", "step")
                .agg(pl.len().alias("sites"), pl.col("kurtosis").median())
                .with_columns(
                    run=pl.lit(arm.parents[1].name),
                    arm=pl.lit(arm.name),
                    seed=pl.lit(int(seed.name.removeprefix("seed-"))),
                    at=pl.lit(at),
                )
                .select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())
            )


def main() -> None:
    """Condense every sweep that is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP")
    for sweep in parser.parse_args().sweeps:
        found = condense(sweep)
        found.write_parquet(sweep / FILE)
        arms = found.select("run", "arm", "seed").n_unique()
        print(f"{sweep / FILE}: {found.height} rows of {arms} arms")


if __name__ == "__main__":
    main()
