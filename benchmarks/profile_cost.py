"""What `bitplan profile` costs: its time over that of plain training passes, and its peak memory.

    python benchmarks/profile_cost.py MODEL

MODEL is anything that `bitplan profile` takes. The command runs as a process of its own, whose wall
time, CPU time and peak resident memory are taken, loading included. Then the same sequences go
forward and backward through the same model, as in training (every parameter gets a gradient), one
at a time as the profile takes them. The goal for SmolLM2-135M on two cores, 16,384 tokens: at most
6 times the plain passes, under 4 GB. Where other processes compete for the cores, the ratio of CPU
times is the one to read. Everything is written to benchmarks/results/profile_cost.json.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from bitplan.options import ProfileOptions
from bitplan.probe.checkpoint import Checkpoint, load_checkpoint
from bitplan.probe.text import load_text, tokenize
from bitplan.progress import track
from bitplan.rundir import hardware, versions, write_json

RESULT = Path(__file__).parent / "results" / "profile_cost.json"
GOAL_RATIO = 6.0
GOAL_GB = 4.0


@dataclass(frozen=True)
class Seconds:
    """Wall and CPU time of something."""

    wall: float
    cpu: float


@contextlib.contextmanager
def clock(who: int = resource.RUSAGE_SELF) -> Iterator[list[Seconds]]:
    """Yield a list that holds the block's time when it ends, of this process or its children."""

    def cpu() -> float:
        usage = resource.getrusage(who)
        return usage.ru_utime + usage.ru_stime

    found: list[Seconds] = []
    wall_start, cpu_start = time.perf_counter(), cpu()
    yield found
    found.append(Seconds(time.perf_counter() - wall_start, cpu() - cpu_start))


def profile_seconds(options: ProfileOptions) -> tuple[Seconds, float, int]:
    """Run the command; return its time, its peak memory in GB and the sites it measured."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [sys.executable, "-c", "from bitplan.cli import main; main()", "profile"]
        command += [options.model, "-o", str(run), "--tokens", str(options.tokens)]
        command += ["--seq-len", str(options.seq_len), "--device", options.device]
        with clock(resource.RUSAGE_CHILDREN) as seconds:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        sites = pl.scan_parquet(run / "profile.parquet").select(pl.len()).collect().item()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return seconds[0], peak / 1e9, sites


def plain_seconds(checkpoint: Checkpoint, options: ProfileOptions) -> Seconds:
    """Return the time of a forward and a backward pass over the profile's sequences."""
    model: Any = checkpoint.model
    ids = tokenize(
        load_text(options.data),
        checkpoint.tokenizer,
        "calibration",
        tokens=options.tokens,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    model.train()
    model(input_ids=ids[:1], labels=ids[:1]).loss.backward()  # buffers and threads are set up
    with clock() as seconds:
        for batch in track(ids.split(1), "plain passes"):
            model.zero_grad()
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    return seconds[0]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=ProfileOptions(model="").tokens)
    parser.add_argument("--seq-len", type=int, default=ProfileOptions(model="").seq_len)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    options = ProfileOptions(
        model=asked.model, tokens=asked.tokens, seq_len=asked.seq_len, device="cpu"
    )
    profile, peak, sites = profile_seconds(options)
    with clock() as loading:
        checkpoint = load_checkpoint(options.model, device="cpu")
    load = loading[0]
    plain = plain_seconds(checkpoint, options)
    facts = checkpoint.facts()
    result = {
        "model": Path(options.model).name,
        "content_hash": facts["content_hash"],
        "num_parameters": facts["num_parameters"],
        "weights_note": facts["weights_note"],
        "tokens": options.tokens,
        "seq_len": options.seq_len,
        "formats": list(options.formats),
        "sites": sites,
        "profile_s": round(profile.wall, 1),
        "of_that_loading_s": round(load.wall, 1),
        "plain_forward_backward_s": round(plain.wall, 1),
        "ratio": round(profile.wall / plain.wall, 2),
        "profile_cpu_s": round(profile.cpu, 1),
        "of_that_loading_cpu_s": round(load.cpu, 1),
        "plain_forward_backward_cpu_s": round(plain.cpu, 1),
        "cpu_ratio": round(profile.cpu / plain.cpu, 2),
        "goal_ratio": GOAL_RATIO,
        "peak_rss_gb": round(peak, 2),
        "goal_peak_rss_gb": GOAL_GB,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[2], 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(asked.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
