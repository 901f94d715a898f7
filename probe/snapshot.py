"""What `profile --compare` is given: statistics of a model at one moment, read from files.

RUN                          the profile of a run directory
RUN/arms/w4a4/seed-0@200     a step of a training's recorded statistics; without @, the last
stats.parquet@200            any file with the columns of tables.PROFILE, such as a Recorder's
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from bitplan.errors import RunError
from bitplan.rundir import MANIFEST
from bitplan.tables import ERRORS, OUTLIERS, PROFILE, Table

STATS = "stats.parquet"
_STEP = re.compile(r"(.+)@(\d+)$")
_NEEDED = ("site", "module", "operand", "role", "step", "in_features", "out_features")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Statistics of one model at one step.

    `text` identifies the calibration text; None where the inputs are those of a training. `errors`
    and `outliers` are None where there is no such file beside the statistics.
    """

    name: str
    profile: pl.DataFrame
    errors: pl.DataFrame | None = None
    outliers: pl.DataFrame | None = None
    text: str | None = None


def load_snapshot(spec: str) -> Snapshot:
    """Read the statistics that `spec` names.

    Raises RunError where there are none, the step was not recorded, or a file is damaged.
    """
    path, step = Path(spec), None
    if not path.exists() and (match := _STEP.fullmatch(spec)):
        path, step = Path(match[1]), int(match[2])
    file = _statistics(path, spec)
    frame = _read(file, PROFILE)
    steps = frame["step"].unique().sort().to_list()
    if not steps:
        raise RunError(f"{file} holds no statistics: it has no rows")
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise RunError(f"{file} has no step {step}: {_known(steps)}{_elsewhere(path)}")
    at = pl.col("step") == step
    beside = {
        table.file: _read(file.with_name(table.file), table)
        for table in (ERRORS, OUTLIERS)
        if file.name == PROFILE.file and file.with_name(table.file).is_file()
    }
    errors = beside.get(ERRORS.file)
    return Snapshot(
        name=spec if len(steps) == 1 or "@" in spec else f"{spec}@{step}",
        profile=frame.filter(at),
        errors=errors.filter(at) if errors is not None else None,
        outliers=beside.get(OUTLIERS.file),
        text=_text(file) if file.name == PROFILE.file else None,
    )


def _statistics(path: Path, spec: str) -> Path:
    """Return the file with the columns of tables.PROFILE that a path stands for."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise RunError(f"nothing to compare at {spec}: there is no such file or directory")
    for name in (PROFILE.file, STATS):
        if (path / name).is_file():
            return path / name
    what = "its profile is not made yet" if (path / MANIFEST).is_file() else "it is no run"
    raise RunError(
        f"{path} has neither {PROFILE.file} nor {STATS}: {what}; name a profiled run directory, "
        "or RUN/arms/<arm>/seed-<k>@STEP"
    )


def _read(path: Path, table: Table) -> pl.DataFrame:
    """Read a file with the columns of a table; those it lacks are null."""
    try:
        frame = pl.read_parquet(path)
        lacking = [name for name in _NEEDED if name not in frame.columns and table is PROFILE]
        if lacking:
            raise RunError(f"{path} holds no statistics of a model: it lacks {lacking[0]!r}")
        return frame.select(
            pl.col(name).cast(dtype) if name in frame.columns else pl.lit(None, dtype).alias(name)
            for name, dtype in table.schema.items()
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _known(steps: list[int]) -> str:
    listed = ", ".join(map(str, steps[:8]))
    return f"it has {listed}" + (f" ... {steps[-1]}" if len(steps) > 8 else "")


def _elsewhere(path: Path) -> str:
    """Say where a run directory keeps the steps of its trainings."""
    places = sorted(place.parent for place in path.glob(f"arms/*/seed-*/{STATS}"))
    return f"; steps of a training are in {places[0]} (+{len(places) - 1})" if places else ""


def _text(file: Path) -> str | None:
    """Return what identifies the calibration text of a profile."""
    note: dict[str, Any] = json.loads(pl.read_parquet_metadata(file).get("bitplan", "{}"))
    data = note.get("data")
    return json.dumps([data, note.get("seed")], sort_keys=True) if data else None
