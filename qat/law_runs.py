"""Trainings as points of the scaling law: run directories or Parquet in, one table out.

A run directory counts where `verify --from-scratch` trained it. What an arm is in the words of the
law follows from its formats, not from its name: all weights in one 4-bit format and all inputs bf16
is `w4a16`, the inputs of FC2 at 8 bits and the rest at 4 is `+fc2`, and so on; an arm that is none
of these (a plan's own mixture) is left out and counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from bitplan.errors import DataError, RunError
from bitplan.formats import Format, parse_format
from bitplan.law import FC2_AT_8
from bitplan.qat.record import RECORD_FILE
from bitplan.rundir import RunDir, read_json
from bitplan.sites import PLANNED_ROLES
from bitplan.tables import PROFILE, TRAININGS

BASELINE = "bf16"


def read_trainings(paths: Sequence[Path], *, force: bool = False) -> tuple[pl.DataFrame, int]:
    """Return tables.TRAININGS of all paths, and how many arms were left out.

    Raises RunError for a path that is neither a run directory nor Parquet of these columns, and
    DataError for trainings on different text or tokens, which `force` pools all the same.
    """
    frames, left_out = [], 0
    for path in paths:
        if path.is_dir():
            frame, skipped = _of_run(RunDir.open(path))
            left_out += skipped
        else:
            frame = _of_file(path)
        frames.append(frame)
    table = pl.concat(frames).unique(maintain_order=True)
    for column in ("text", "tokenizer"):
        if not force and table[column].n_unique() > 1:
            found = ", ".join(str(v)[:8] for v in table[column].unique(maintain_order=True))
            raise DataError(
                f"the trainings are on different {column}s ({found}), whose losses do not compare: "
                "fit them apart, or pool them with --force"
            )
    return table, left_out


def _of_file(path: Path) -> pl.DataFrame:
    try:
        return TRAININGS.frame(
            pl.read_parquet(path).select(*TRAININGS.schema).iter_rows(named=True)
        )
    except (pl.exceptions.PolarsError, OSError, TypeError) as error:
        raise RunError(
            f"{path} is neither a run directory nor Parquet with the columns "
            f"{', '.join(TRAININGS.schema)}: {error}"
        ) from error


def _of_run(run: RunDir) -> tuple[pl.DataFrame, int]:
    profile = run.read_table(PROFILE.file).filter(step=0)
    role = dict(profile.select("site", "role").iter_rows())
    length = dict(profile.select("site", "in_features").iter_rows())
    rows, left_out = [], 0
    for path in sorted((run.path / "arms").glob(f"*/seed-*/{RECORD_FILE}")):
        record = read_json(path)
        if record.get("same_as") or not record["config"].get("from_scratch"):
            continue
        formats = {site: parse_format(name) for site, name in record["config"]["formats"].items()}
        precision = classify(formats, role)
        if precision is None:
            left_out += 1
            continue
        rows.append(
            {
                "params": record["num_non_embedding_parameters"],
                "tokens": record["tokens"],
                "group_size": _group_size(formats, length),
                "precision": precision,
                "seed": record["seed"],
                "loss": record["loss"]["heldout"],
                "text": record["config"]["heldout"],
                "tokenizer": run.manifest["model"]["content_hash"],
            }
        )
    return TRAININGS.frame(rows), left_out


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


def _group_size(formats: Mapping[str, Format], length: Mapping[str, int]) -> int | None:
    """Return the elements that share a scale at 4 bits, the shortest row where rows do."""
    sizes = [f.group_size or length[site] for site, f in formats.items() if f.bits == 4]
    return min(sizes, default=None)


def deltas(trainings: pl.DataFrame) -> pl.DataFrame:
    """Return params, tokens, group_size, precision, seed, delta: each training less its bf16.

    The bf16 training is that of the same params, tokens and seed; where there is none the training
    is left out.
    """
    key = ["params", "tokens", "seed"]
    base = (
        trainings.filter(precision=BASELINE).group_by(key).agg(pl.col("loss").mean().alias("base"))
    )
    return (
        trainings.filter(pl.col("precision") != BASELINE)
        .join(base, on=key, maintain_order="left")
        .select(*key, "group_size", "precision", delta=pl.col("loss") - pl.col("base"))
    )


def facts(trainings: pl.DataFrame) -> dict[str, Any]:
    """Return the ranges that a law fitted on these trainings holds for."""
    quantized = trainings.filter(pl.col("precision") != BASELINE)
    return {
        name: [float(quantized[name].min()), float(quantized[name].max())]  # type: ignore[arg-type]
        for name in ("params", "tokens", "group_size")
    }
