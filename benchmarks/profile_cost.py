"""What `bitplan profile` costs: its time over that of plain training passes, and its peak memory.

    python benchmarks/profile_cost.py MODEL

MODEL is anything that `bitplan profile` takes. The command runs as a process of its own, whose wall
time and peak resident memory are taken, loading included. Then the same sequences go forward and
backward through the same model, as in training (every parameter gets a gradient), one at a time as
the profile takes them. The goal for SmolLM2-135M on two cores, 16,384 tokens: at most 6 times the
plain passes, under 4 GB. Everything is written to benchmarks/results/profile_cost.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch

from bitplan.options import ProfileOptions
from bitplan.probe.checkpoint import Checkpoint, load_checkpoint
from bitplan.probe.text import load_text, tokenize
from bitplan.progress import track
from bitplan.rundir import versions, write_json

RESULT = Path(__file__).parent / "results" / "profile_cost.json"
GOAL_RATIO = 6.0
GOAL_GB = 4.0


def profile_seconds(options: ProfileOptions) -> tuple[float, float, int]:
    """Run the command; return its wall time, its peak memory in GB and the sites it measured."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [sys.executable, "-c", "from bitplan.cli import main; main()", "profile"]
        command += [options.model, "-o", str(run), "--tokens", str(options.tokens)]
        command += ["--seq-len", str(options.seq_len), "--device", options.device]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        sites = pl.scan_parquet(run / "profile.parquet").select(pl.len()).collect().item()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return seconds, peak / 1e9, sites


def plain_seconds(checkpoint: Checkpoint, options: ProfileOptions) -> float:
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
    start = time.perf_counter()
    for batch in track(ids.split(1), "plain passes"):
        model.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    return time.perf_counter() - start


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
    start = time.perf_counter()
    checkpoint = load_checkpoint(options.model, device="cpu")
    load = time.perf_counter() - start
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
        "profile_s": round(profile, 1),
        "of_that_loading_s": round(load, 1),
        "plain_forward_backward_s": round(plain, 1),
        "ratio": round(profile / plain, 2),
        "ratio_without_loading": round((profile - load) / plain, 2),
        "goal_ratio": GOAL_RATIO,
        "peak_rss_gb": round(peak, 2),
        "goal_peak_rss_gb": GOAL_GB,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[2], 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }
    write_json(asked.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
