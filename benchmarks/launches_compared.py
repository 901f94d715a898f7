"""One training in one process, in one again, in parts, with DDP and with FSDP2: how far apart.

    python benchmarks/launches_compared.py RUN [--processes 2] [--device cuda|cpu]

RUN is a planned run directory; it is copied, not changed. Each row of LAUNCHES trains the same arms
from it by `bitplan verify`, with one seed after another, and is compared with the first: the
held-out loss, its largest difference over single sequences, and the kurtosis that was recorded. A
step taken in parts rounds as that of several processes does, which hold as many sequences each.
FSDP2 shards on GPUs alone. Written to benchmarks/results/launches_compared.json.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

from bitplan.qat.record import HELDOUT_FILE, RECORD_FILE, STATS_FILE, arm_dir
from bitplan.rundir import RunDir, versions, write_json

RESULT = Path(__file__).parent / "results" / "launches_compared.json"
ARMS = ("bf16", "planned")
SEEDS = 2
TRAINING = ["--arms", ",".join(ARMS), "--seeds", str(SEEDS)]
TRAINING += ["--batch-size", "16", "--seq-len", "256"]
DDP = {"cuda": ["--multi_gpu"], "cpu": ["--cpu"]}
SHARDED = ["--use_fsdp", "--fsdp_version", "2"]
SHARDED += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
SITE = ["module", "operand", "step"]


def launches(device: str, processes: int) -> dict[str, list[str]]:
    """Return the words before `verify RUN ...`, by name."""
    plain = [sys.executable, "-m", "bitplan"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    accelerate += ["--num_processes", str(processes), "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    found = {
        "one process": plain,
        "one process, again": plain,
        f"one process, {processes} parts": plain,
        f"DDP, {processes} processes": [*accelerate, *DDP[device], "-m", "bitplan"],
    }
    if device == "cuda":
        found[f"FSDP2, {processes} processes"] = [*accelerate, *SHARDED, "-m", "bitplan"]
    return found


def read(run: RunDir, arm: str, seed: int) -> tuple[pl.Series, pl.DataFrame, dict[str, Any]]:
    """Return the held-out losses by sequence, the statistics and the record of a training."""
    place = arm_dir(arm, seed)
    losses = run.read_table(f"{place}/{HELDOUT_FILE}").sort("sequence")["loss"]
    stats = run.read_table(f"{place}/{STATS_FILE}").select(*SITE, "kurtosis")
    return losses, stats, run.read_json(f"{place}/{RECORD_FILE}")


def compare(run: RunDir, first: RunDir) -> list[dict[str, Any]]:
    """Return a row per arm and seed: how far a launch lies from the first one."""
    rows = []
    for arm in ARMS:
        for seed in range(SEEDS):
            losses, stats, record = read(run, arm, seed)
            base, base_stats, _ = read(first, arm, seed)
            both = stats.join(base_stats, on=SITE, suffix="_first", validate="1:1")
            off = (both["kurtosis"] / both["kurtosis_first"] - 1).abs()
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "loss": losses.mean(),
                    "difference_nats": (losses - base).mean(),
                    "largest_of_a_sequence_nats": (losses - base).abs().max(),
                    "kurtosis_off_median": off.median(),
                    "kurtosis_off_max": off.max(),
                    "sites_of_both": both.height == stats.height == base_stats.height,
                    "seconds": record["seconds"],
                    "hardware": record["hardware"],
                }
            )
    return rows


def shown(item: tuple[str, Any]) -> str:
    """Return a number of a row with its name; nothing for what is not one."""
    name, value = item
    return f" {name} {value:.3g}" if isinstance(value, float) else ""


def main() -> None:
    """Launch, compare, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=list(DDP), default="cuda")
    parser.add_argument("--steps", default="40")
    parser.add_argument("--to", type=Path, default=RESULT)
    asked = parser.parse_args()
    training = [*TRAINING, "--steps", asked.steps, "--device", asked.device]
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs: list[RunDir] = []
        for name, words in launches(asked.device, asked.processes).items():
            parts = ["--accumulate", str(asked.processes)] if name.endswith("parts") else []
            copy = shutil.copytree(asked.run, Path(folder) / str(len(runs)))
            done = subprocess.run(
                [*words, "verify", str(copy), *training, *parts], capture_output=True, text=True
            )
            runs.append(RunDir.open(copy))
            # 1 says that two arms give no verdict; accelerate makes every failure a 1.
            if done.returncode not in (0, 1) or not (copy / arm_dir(ARMS[-1], SEEDS - 1)).is_dir():
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            found[name] = compare(runs[-1], runs[0])
            for row in found[name]:
                print(f"{name:24} {row['arm']:8} seed {row['seed']}", *map(shown, row.items()))
    about = {
        "training": training,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    write_json(asked.to, {"launches": found, **about})


if __name__ == "__main__":
    main()
