"""What an arm leaves behind: arms/<arm>/seed-<k>/, read and written here alone.

    metrics.parquet   a row per step (tables.METRICS)
    stats.parquet     statistics recorded during training (tables.PROFILE)
    heldout.parquet   final loss of each held-out sequence (tables.HELDOUT)
    record.json       configuration, its hash, losses, hashes, time; written last
    trunk.json        of a branched arm: hash of the weights that it began from; written first
    state-<step>/     a training under way (state.py); gone when it ends
    stopped.json      why a training cannot go on, and under which configuration

An arm is finished when its record is there with the hash of the configuration that is asked for.
The hash covers whatever changes the numbers and nothing else, not the arm's name either, so that
two arms of equal formats share one training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitplan.qat.state import remove_states
from bitplan.rundir import RunDir, write_atomic

METRICS_FILE = "metrics.parquet"
STATS_FILE = "stats.parquet"
HELDOUT_FILE = "heldout.parquet"
RECORD_FILE = "record.json"
STOPPED_FILE = "stopped.json"
TRUNK_FILE = "trunk.json"
TABLE_FILES = (METRICS_FILE, STATS_FILE, HELDOUT_FILE)


def arm_dir(arm: str, seed: int) -> str:
    """Return the arm's directory, relative to the run directory."""
    return f"arms/{arm}/seed-{seed}"


def arm_files(arm: str, seed: int) -> list[str]:
    """Return the files of a finished arm, relative to the run directory."""
    return [f"{arm_dir(arm, seed)}/{name}" for name in (*TABLE_FILES, RECORD_FILE)]


def finished(run: RunDir, arm: str, seed: int, config_hash: str) -> dict[str, Any] | None:
    """Return the record of an arm that was trained under exactly this configuration, or None."""
    if not all((run.path / name).is_file() for name in arm_files(arm, seed)):
        return None
    record = run.read_json(f"{arm_dir(arm, seed)}/{RECORD_FILE}")
    if not isinstance(record, dict) or record.get("config_hash") != config_hash:
        return None
    return record


def copy_arm(run: RunDir, record: Mapping[str, Any], arm: str) -> None:
    """Give `arm` the results of another whose configuration is the same; `same_as` names it."""
    source, seed = record["arm"], record["seed"]
    for name in TABLE_FILES:
        content = (run.path / arm_dir(source, seed) / name).read_bytes()
        _write(run.path / arm_dir(arm, seed) / name, content)
    run.write_json(f"{arm_dir(arm, seed)}/{RECORD_FILE}", {**record, "arm": arm, "same_as": source})
    clean(run, arm, seed)


def _write(path: Path, content: bytes) -> None:
    write_atomic(path, lambda file: file.write(content))


def heldout_losses(run: RunDir, arm: str, seed: int) -> npt.NDArray[np.float64]:
    """Return a finished arm's losses, [sequence], nats per token."""
    frame = run.read_table(f"{arm_dir(arm, seed)}/{HELDOUT_FILE}").sort("sequence")
    losses: npt.NDArray[np.float64] = frame["loss"].to_numpy()
    return losses


def begin_branch(run: RunDir, arm: str, seed: int, weights: str) -> None:
    """Note the hash of the weights that an arm begins from; drop what began from others."""
    if trunk_weights(run, arm, seed) == weights:
        return
    (run.path / arm_dir(arm, seed) / RECORD_FILE).unlink(missing_ok=True)
    clean(run, arm, seed)
    run.write_json(f"{arm_dir(arm, seed)}/{TRUNK_FILE}", {"weights": weights})


def trunk_weights(run: RunDir, arm: str, seed: int) -> str | None:
    """Return the hash of the weights that a branched arm began from, None from scratch."""
    name = f"{arm_dir(arm, seed)}/{TRUNK_FILE}"
    return str(run.read_json(name)["weights"]) if (run.path / name).is_file() else None


def stop(run: RunDir, arm: str, seed: int, config_hash: str, reason: str) -> None:
    """Note why a training under this configuration cannot go on."""
    value = {"config_hash": config_hash, "reason": reason}
    run.write_json(f"{arm_dir(arm, seed)}/{STOPPED_FILE}", value)


def stopped(run: RunDir, arm: str, seed: int, config_hash: str) -> str | None:
    """Return why a training under exactly this configuration cannot go on, None if it can."""
    name = f"{arm_dir(arm, seed)}/{STOPPED_FILE}"
    if not (run.path / name).is_file():
        return None
    note = run.read_json(name)
    return str(note["reason"]) if note["config_hash"] == config_hash else None


def clean(run: RunDir, arm: str, seed: int) -> None:
    """Remove what tells of a training under way, and what a killed process left half-written."""
    directory = run.path / arm_dir(arm, seed)
    remove_states(directory)
    (directory / STOPPED_FILE).unlink(missing_ok=True)
    for left in directory.glob(".*.tmp"):
        left.unlink(missing_ok=True)
