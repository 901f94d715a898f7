"""R of every (N, D, G) of a sweep, as `verify` judges it: which operand's error is the larger.

    before   w16a4 over w4a16: all inputs at 4 bits
    after    w16a4-fc2-8 over w4a16: those of FC2 at 8

with the intervals and the words of verdict.py, from the held-out losses of the seeds that bf16 and
both arms have in common; arms of a trunk, where they began from the same weights.

Losses of single sequences are in the run directories alone. A row that was read elsewhere stays as
it is, unless the trainings that are here have at least as many seeds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bitplan.qat import verdict as arithmetic
from bitplan.qat.law_runs import BASELINE, RUNS
from bitplan.qat.record import HELDOUT_FILE, arm_dir, heldout_losses
from bitplan.rundir import RunDir
from bitplan.tables import RATIOS

WEIGHTS = "w4a16"
SHARED = ("params", "tokens", "group_size", "trunk_tokens", "schedule")
INPUTS = {False: "w16a4", True: "w16a4-fc2-8"}
"""Whether FC2's inputs have 8 bits, to the precision."""


def read_ratios(sweep: Path, trainings: pl.DataFrame) -> pl.DataFrame:
    """Return tables.RATIOS of the trainings, tables.SWEEP, and rows whose records are gone."""
    rows: list[dict[str, Any]] = []
    for (name,), of_run in trainings.group_by("run", maintain_order=True):
        place = sweep / RUNS / str(name)
        if place.is_dir():
            rows += _of_run(RunDir.open(place), of_run)
    table = RATIOS.frame(rows)
    if (sweep / RATIOS.file).is_file():
        before = pl.read_parquet(sweep / RATIOS.file)
        table = pl.concat([table, RATIOS.frame(before.iter_rows(named=True))])
    key = ["run", "group_size", "fc2_at_8"]
    best = table.sort("seeds", descending=True, maintain_order=True).unique(key, keep="first")
    return best.sort(*SHARED[:3], "run", "fc2_at_8")


def _of_run(run: RunDir, trainings: pl.DataFrame) -> Iterator[dict[str, Any]]:
    seeds = {
        str(arm): set(of_arm.select("seed", "trunk").iter_rows())
        for (arm,), of_arm in trainings.group_by("arm", maintain_order=True)
    }
    for arm in [arm for arm in seeds if arm.startswith(f"{WEIGHTS}-")]:
        first = trainings.filter(pl.col("arm") == arm).row(0, named=True)
        for fc2_at_8, inputs in INPUTS.items():
            arms = (BASELINE, arm, inputs + arm.removeprefix(WEIGHTS))
            paired_seeds = set.intersection(*(seeds.get(name, set()) for name in arms))
            common = sorted(
                seed
                for seed, _ in paired_seeds
                if all((run.path / arm_dir(name, seed) / HELDOUT_FILE).is_file() for name in arms)
            )
            if not common:
                continue
            losses = {
                name: np.stack([heldout_losses(run, name, seed) for seed in common])
                for name in arms
            }
            paired = arithmetic.differences(losses, BASELINE)
            ratio = arithmetic.ratio(paired[arms[2]], paired[arm])
            yield {
                **{key: first[key] for key in SHARED},
                "fc2_at_8": fc2_at_8,
                "R": ratio.estimate,
                "low": ratio.low,
                "high": ratio.high,
                "verdict": arithmetic.decide(ratio),
                "seeds": len(common),
                "run": run.path.name,
            }
