"""Read what a run directory holds, whole or partial, without taking its lock.

Files appear by rename, so a report may be made while a training runs. What a finished stage says it
wrote must be there and readable, with the columns used here; what no stage has made yet is None.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from bitplan import tables
from bitplan.errors import RunError
from bitplan.rundir import RunDir

# The columns a chart cannot do without; any other column of the table is null where it is absent.
_NEEDED = {
    tables.PROFILE.file: ("site", "operand", "role", "block", "step", "kurtosis"),
    tables.ERRORS.file: ("site", "step", "format", "sqnr_db"),
    tables.SENSITIVITY.file: ("site", "format", "method", "delta_loss"),
    tables.OUTLIERS.file: ("kind", "module", "block", "channel", "value"),
    tables.FRONTIER.file: ("label", "budget", "cost", "delta_loss"),
    tables.METRICS.file: ("step", "tokens", "loss"),
}
STATS = "stats.parquet"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training of one arm under one seed, finished or not."""

    name: str
    seed: int
    record: dict[str, Any]
    metrics: pl.DataFrame | None
    stats: pl.DataFrame | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds; None where the stage that makes it has not run."""

    path: Path
    manifest: dict[str, Any]
    profile: pl.DataFrame | None = None
    errors: pl.DataFrame | None = None
    sensitivity: pl.DataFrame | None = None
    outliers: pl.DataFrame | None = None
    frontier: pl.DataFrame | None = None
    plan: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None
    arms: tuple[Arm, ...] = field(default=())

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def model(self) -> dict[str, Any]:
        """The manifest's facts about the model; empty before a profile."""
        facts = self.manifest.get("model") or {}
        return facts if isinstance(facts, dict) else {"source": str(facts)}

    @property
    def model_name(self) -> str:
        """The last part of the model's source, or the run's name."""
        source = str(self.model.get("source") or "").rstrip("/")
        return source.rpartition("/")[2] or self.name

    @property
    def weights_note(self) -> str | None:
        """What must be said wherever weight error is shown, e.g. rounded already."""
        note = self.model.get("weights_note")
        return str(note) if note else None

    @property
    def stale(self) -> tuple[str, ...]:
        """What was made from files that have changed since, and the command to make it again."""
        found = []
        stages = self.manifest.get("stages") or {}
        made_from = ((stages.get("plan") or {}).get("options") or {}).get("inputs") or {}
        now = (stages.get("profile") or {}).get("hashes") or {}
        if any(now.get(name, known) != known for name, known in made_from.items()):
            found.append(
                f"The plan was made from an older profile: run `bitplan plan {self.name}`."
            )
        planned, verified = ((doc or {}).get("plan_id") for doc in (self.plan, self.verdict))
        if None not in (planned, verified) and planned != verified:
            found.append(
                "The verdict and the trainings are of another plan than the one shown: run "
                f"`bitplan verify {self.name}`."
            )
        return tuple(found)


def load_run(path: Path) -> Run:
    """Read a run directory.

    Raises RunError where it is none, is of another version, or holds a file that is missing
    although its stage finished, cannot be read, or lacks a column.
    """
    run = RunDir.open(path)
    _check_promised(run)

    def table(spec: tables.Table) -> pl.DataFrame | None:
        return read_table(run.path / spec.file, spec)

    def document(name: str) -> dict[str, Any] | None:
        if not (run.path / name).is_file():
            return None
        value = run.read_json(name)
        if not isinstance(value, dict):
            raise RunError(f"{run.path / name} holds no JSON object: make it again")
        return value

    return Run(
        path=run.path,
        manifest=run.manifest,
        profile=table(tables.PROFILE),
        errors=table(tables.ERRORS),
        sensitivity=table(tables.SENSITIVITY),
        outliers=table(tables.OUTLIERS),
        frontier=table(tables.FRONTIER),
        plan=document("plan.json"),
        verdict=document("verdict.json"),
        arms=tuple(_load_arms(run)),
    )


def _check_promised(run: RunDir) -> None:
    """Raise RunError where a finished stage's file is gone: a chart must not vanish silently."""
    for stage, entry in run.manifest.get("stages", {}).items():
        if stage == "report":
            continue
        gone = [name for name in entry.get("files", ()) if not (run.path / name).is_file()]
        if gone:
            more = f" (+{len(gone) - 1})" if len(gone) > 1 else ""
            raise RunError(
                f"{run.path} lacks {gone[0]}{more}, which its {stage} wrote: "
                f"run `bitplan {stage}` again"
            )


def read_table(path: Path, spec: tables.Table) -> pl.DataFrame | None:
    """Read a table with the columns of `spec`; None where there is no such file.

    NaN and infinite floats become null. Raises RunError where the file is damaged or a column that
    the report needs is missing or of another type.
    """
    if not path.is_file():
        return None
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    missing = [name for name in _NEEDED[spec.file] if name not in frame.columns]
    if missing:
        raise RunError(f"{path} lacks the column {missing[0]}: was it written by another version?")
    try:
        frame = frame.select(
            pl.col(name).cast(dtype) if name in frame.columns else pl.lit(None, dtype).alias(name)
            for name, dtype in spec.schema.items()
        )
    except pl.exceptions.PolarsError as error:
        raise RunError(f"{path} has a column of another type: {error}") from error
    floats = pl.selectors.float()
    return frame.with_columns(pl.when(floats.is_finite()).then(floats).otherwise(None))


def _load_arms(run: RunDir) -> Iterable[Arm]:
    """Yield the arms in the order they stand on disk, sorted by name and seed."""
    found = []
    for folder in (run.path / "arms").glob("*/seed-*"):
        seed = folder.name.removeprefix("seed-")
        if folder.is_dir() and seed.isdecimal():
            found.append((folder.parent.name, int(seed), folder))
    for name, number, folder in sorted(found):
        record = (
            run.read_json(str(folder.relative_to(run.path) / "record.json"))
            if (folder / "record.json").is_file()
            else {}
        )
        yield Arm(
            name=name,
            seed=number,
            record=record if isinstance(record, dict) else {},
            metrics=read_table(folder / tables.METRICS.file, tables.METRICS),
            stats=read_table(folder / STATS, tables.PROFILE),
        )
