"""Trainings as points of the scaling law: runs, sweeps or Parquet in, one table out.

A run directory counts where `verify --from-scratch` trained it. What an arm is in the words of the
law follows from its formats, not from its name: all weights in one 4-bit format and all inputs bf16
is `w4a16`, the inputs of FC2 at 8 bits and the rest at 4 is `+fc2`, and so on; an arm that is none
of these (a plan's own mixture) is left out and counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bitplan.errors import DataError, RunError
from bitplan.formats import Format, parse_format
from bitplan.law import FC2_AT_8
from bitplan.qat.record import RECORD_FILE, STATS_FILE, heldout_losses, trunk_weights
from bitplan.rundir import MANIFEST, RunDir, read_json
from bitplan.sites import PLANNED_ROLES
from bitplan.tables import SWEEP, TRAININGS

BASELINE = "bf16"
RUNS = "runs"
"""Where a sweep keeps its run directories."""


def read_trainings(
    paths: Sequence[Path],
    *,
    schedule: str | None = None,
    force: bool = False,
    branched: bool | None = None,
) -> tuple[pl.DataFrame, int]:
    """Return tables.SWEEP of all paths, null where unknown, and how many arms were left out.

    schedule: only the trainings whose learning rate fell so. branched: only arms that branched from
    a trunk, or only those from scratch. Raises RunError for a path that is neither a run directory
    nor Parquet of these columns, and DataError for trainings on different text or tokens, of both
    kinds, or of one cell under several recipes, which `force` pools all the same.
    """
    frames, left_out = [], 0
    for path in paths:
        if (path / SWEEP.file).is_file() or (path / RUNS).is_dir():
            frame = read_sweep(path)
        elif path.is_dir():
            rows, skipped = _of_run(RunDir.open(path))
            frame, left_out = SWEEP.frame(rows), left_out + skipped
        else:
            frame = _of_file(path)
        frames.append(frame)
    table = pl.concat(frames).unique(maintain_order=True)
    if branched is not None:
        table = table.filter(pl.col("trunk_tokens").is_not_null() == branched)
    if schedule is not None:
        table = table.filter(schedule=schedule)
    if not force:
        refuse_mixed(table)
    return table, left_out


def refuse_mixed(table: pl.DataFrame) -> None:
    """Raise DataError for trainings whose losses or deltas do not compare, or of one cell twice."""
    for column in ("text", "tokenizer", "schedule"):
        values = table[column].drop_nulls().unique(maintain_order=True)
        if len(values) > 1:
            found = ", ".join(str(v)[:8] for v in values)
            raise DataError(
                f"the trainings are on different {column}s ({found}), whose losses do not compare: "
                "fit them apart, or pool them with --force"
            )
    _refuse_both_kinds(table)
    _refuse_twice(table)


def _refuse_both_kinds(table: pl.DataFrame) -> None:
    scratch = table["trunk_tokens"].null_count()
    if 0 < scratch < table.height:
        raise DataError(
            f"{scratch} of the trainings are from scratch and {table.height - scratch} branched "
            "from a trunk, and their deltas do not compare: fit them apart with --from-scratch or "
            "--branched, or pool them with --force"
        )


def _refuse_twice(table: pl.DataFrame) -> None:
    """Raise DataError where two trainings are of the same cell and seed."""
    cell = ["params", "tokens", "precision", "group_size", "seed", "arm"]
    twice = table.group_by(cell, maintain_order=True).len().filter(pl.col("len") > 1)
    if not twice.is_empty():
        row = twice.row(0, named=True)
        raise DataError(
            f"{twice.height} trainings are there twice, under different recipes (the first: "
            f"{row['precision']}, N {row['params']:,}, D {row['tokens']:,}, seed {row['seed']}): "
            "fit them apart, or pool them with --force"
        )


def _of_file(path: Path) -> pl.DataFrame:
    try:
        found = pl.read_parquet(path)
        known = [name for name in SWEEP.schema if name in found.columns]
        needed = [name for name in TRAININGS.schema if name != "schedule"]
        return SWEEP.frame(found.select(*known, *set(needed) - set(known)).iter_rows(named=True))
    except (pl.exceptions.PolarsError, OSError, TypeError) as error:
        raise RunError(
            f"{path} is neither a run directory nor Parquet with the columns "
            f"{', '.join(TRAININGS.schema)}: {error}"
        ) from error


def _of_run(run: RunDir) -> tuple[list[dict[str, Any]], int]:
    """Return a row of tables.SWEEP for each training from scratch, and how many are none."""
    rows, left_out = [], 0
    for path in sorted((run.path / "arms").glob(f"*/seed-*/{RECORD_FILE}")):
        record = read_json(path)
        if record.get("same_as") or not record["config"].get("from_scratch"):
            continue
        formats = {site: parse_format(name) for site, name in record["config"]["formats"].items()}
        stats = pl.read_parquet(
            path.with_name(STATS_FILE), columns=["site", "role", "in_features", "out_features"]
        ).unique("site")
        precision = classify(formats, dict(stats.select("site", "role").iter_rows()))
        if precision is None:
            left_out += 1
            continue
        recipe = record["config"]["recipe"]
        trunk = record["config"].get("trunk")
        trunk_tokens = 0 if trunk is None else trunk["tokens"]
        tokenizer = record["config"].get("tokenizer")
        rows.append(
            {
                "params": record["num_non_embedding_parameters"],
                "tokens": trunk_tokens + record["tokens"],
                "trunk_tokens": trunk_tokens or None,
                "trunk": trunk_weights(run, record["arm"], record["seed"]),
                "group_size": _group_size(formats, stats),
                "precision": precision,
                "seed": record["seed"],
                "loss": record["loss"]["heldout"],
                "text": record["config"]["heldout"],
                "tokenizer": tokenizer or run.manifest["model"]["content_hash"],
                **{key: recipe[key] for key in ("schedule", "lr", "batch_size", "seq_len")},
                "seconds": record["seconds"],
                "tokens_per_second": record["tokens"] / record["seconds"],
                "hardware": record["hardware"],
                "run": run.path.name,
                "arm": record["arm"],
                "config_hash": record["config_hash"],
            }
        )
    return _with_deltas(run, rows), left_out


def _with_deltas(run: RunDir, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with delta and its standard error over the held-out sequences."""
    losses = {(r["arm"], r["seed"]): heldout_losses(run, r["arm"], r["seed"]) for r in rows}
    base = {
        (r["seed"], r["trunk"]): losses[r["arm"], r["seed"]]
        for r in rows
        if r["precision"] == BASELINE
    }
    found = []
    for row in rows:
        extra, key = {}, (row["seed"], row["trunk"])
        if key in base and row["precision"] != BASELINE:
            paired = losses[row["arm"], row["seed"]] - base[key]
            many = len(paired) > 1
            extra = {
                "delta": float(paired.mean()),
                "stderr": float(paired.std(ddof=1) / np.sqrt(len(paired))) if many else None,
            }
        found.append({**row, **extra})
    return found


def read_sweep(path: Path) -> pl.DataFrame:
    """Return tables.SWEEP of a sweep's directory: its records, and rows whose records are gone.

    Raises RunError for a table that cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for manifest in sorted((path / RUNS).glob(f"*/{MANIFEST}")):
        rows += _of_run(RunDir.open(manifest.parent))[0]
    table = SWEEP.frame(rows)
    if (path / SWEEP.file).is_file():
        table = pl.concat([table, _of_file(path / SWEEP.file)])
    table = table.unique(["run", "arm", "seed"], keep="first", maintain_order=True)
    return table.sort("params", "tokens", "precision", "group_size", "seed", maintain_order=True)


def classify(formats: Mapping[str, Format], role: Mapping[str, str]) -> str | None:
    """Return the law's name for an assignment of formats to sites; None where it has none.

    role: of every site. Sites that `formats` lacks are bf16.
    """
    if not formats:
        return BASELINE
    sites = [site for site, r in role.items() if r in PLANNED_ROLES]
    weights = _uniform(formats, [s for s in sites if s.endswith(":weight")])
    inputs = [s for s in sites if s.endswith(":input")]
    fc2 = _uniform(formats, [s for s in inputs if role[s] == "fc2"])
    rest = _uniform(formats, [s for s in inputs if role[s] != "fc2"])
    if weights not in (4, 16) or rest not in (4, 16) or fc2 not in (rest, 8):
        return None
    if fc2 == 8 and rest == 16:
        return None
    return f"w{weights}a{rest}" + FC2_AT_8 * (fc2 == 8)


def _uniform(formats: Mapping[str, Format], sites: Iterable[str]) -> int | None:
    """Return the bits that all sites have, None where they differ."""
    bits = {formats[site].bits if site in formats else 16 for site in sites}
    return bits.pop() if len(bits) == 1 else None


def _group_size(formats: Mapping[str, Format], shapes: pl.DataFrame) -> int | None:
    """Return the elements that share a scale; None where nothing has 4 bits.

    Sites at 8 bits count too: FC2's inputs at 8 bits leave an arm's G what it was. Where the sites
    differ, as rows do, the size whose log2, which is what the law takes, is the
    mean of theirs, weighted by the elements of the weight.
    """
    if all(fmt.bits != 4 for fmt in formats.values()):
        return None
    sizes = {site: fmt.group_size for site, fmt in formats.items()}
    found = shapes.filter(pl.col("site").is_in(list(sizes))).with_columns(
        size=pl.col("site")
        .replace_strict(sizes, return_dtype=pl.Int64)
        .fill_null(pl.col("in_features")),
        weight=pl.col("in_features") * pl.col("out_features"),
    )
    logs = np.average(np.log2(found["size"].to_numpy()), weights=found["weight"].to_numpy())
    return round(2 ** float(logs))


def deltas(trainings: pl.DataFrame) -> pl.DataFrame:
    """Return params, tokens, group_size, precision, seed, delta: each training less its bf16.

    The bf16 training is that of the same params, tokens and seed, and of the same weights of a
    trunk; where there is none the training is left out.
    """
    names = ("params", "tokens", "seed", "trunk_tokens", "trunk")
    key = [name for name in names if name in trainings.columns]
    base = (
        trainings.filter(precision=BASELINE).group_by(key).agg(pl.col("loss").mean().alias("base"))
    )
    return (
        trainings.filter(pl.col("precision") != BASELINE)
        .join(base, on=key, maintain_order="left", nulls_equal=True)
        .select(
            "params",
            "tokens",
            "seed",
            "group_size",
            "precision",
            delta=pl.col("loss") - pl.col("base"),
        )
    )


def facts(trainings: pl.DataFrame) -> dict[str, Any]:
    """Return the ranges that a law fitted on these trainings holds for."""
    quantized = trainings.filter(pl.col("precision") != BASELINE)
    return {
        name: [float(quantized[name].min()), float(quantized[name].max())]  # type: ignore[arg-type]
        for name in ("params", "tokens", "group_size")
    }
