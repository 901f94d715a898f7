"""How fast weights stream: `bitplan profile --weights-only` against the largest |w| alone.

    python benchmarks/weights_only.py --folder DIR --gb 10

Writes a sharded bf16 checkpoint of Llama shapes under DIR, runs both over it in turn, each pass a
process of its own, and removes it. A profile hashes the files, takes all statistics and writes the
tables; its statistics alone are timed too. Imports are not. Where other processes compete for the
cores, CPU times say more. The alternative reads the same tensors from the same maps, each
once, and takes `abs().amax()`. The goal is at least half of its speed. Peak memory is the process's
resident set, mapped pages among it. Best pass of each; written to
benchmarks/results/weights_only.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitplan.formats import parse_formats
from bitplan.options import DEFAULT_FORMATS, ProfileOptions
from bitplan.probe.profile import profile_checkpoint
from bitplan.probe.weights import profile_weights
from bitplan.progress import track
from bitplan.rundir import hardware, versions, write_json

RESULT = Path(__file__).parent / "results" / "weights_only.json"
GOAL_RATIO = 0.5
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14_336, 32_768
_BLOCK = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
_BLOCK_BYTES = 2 * sum(rows * columns for rows, columns in _BLOCK.values())


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a shard per block until there are so many gigabytes; return the bytes written."""
    blocks = max(1, round((gigabytes * 1e9 - 2 * HIDDEN * VOCABULARY) / _BLOCK_BYTES))
    save = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN).bfloat16()}
    for index in track(range(blocks), "writing the checkpoint"):
        for name, shape in _BLOCK.items():
            weight = torch.randn(shape).mul_(0.02).bfloat16()
            save[f"model.layers.{index}.{name}.weight"] = weight
        save_file(save, folder / f"model-{index + 1:05}-of-{blocks:05}.safetensors")
        save = {}
    return sum(path.stat().st_size for path in folder.iterdir())


def profile(folder: Path, formats: str) -> None:
    """Do what the command does."""
    named = tuple(formats.split(","))
    options = ProfileOptions(model=str(folder), formats=named, weights_only=True, device="cpu")
    with tempfile.TemporaryDirectory() as run:
        profile_checkpoint(Path(run) / "run", options)


def statistics(folder: Path, formats: str) -> None:
    """Take all statistics, as the command does."""
    for _ in profile_weights(str(folder), parse_formats(formats.split(","))):
        pass


def largest(folder: Path, _formats: str) -> None:
    """Read every tensor and take its largest |w|."""
    for path in sorted(folder.iterdir()):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                float(file.get_tensor(name).abs().amax())


PASSES = {"profile": profile, "statistics": statistics, "absmax": largest}


def run(kind: str, folder: Path, formats: str) -> list[float]:
    """Run a pass as a process of its own; return its wall and CPU seconds and its peak GB."""
    command = [sys.executable, __file__, "--run", kind, "--folder", str(folder)]
    command += ["--formats", formats]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(number) for number in text.split()]


def peak_gb() -> float:
    """Return the peak memory of this process; its ru_maxrss would begin with that of its parent."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint may lie")
    parser.add_argument("--gb", type=float, default=10.0)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--formats", default=",".join(DEFAULT_FORMATS))
    parser.add_argument("--run", choices=PASSES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    if asked.run:
        start, cpu_start = time.perf_counter(), time.process_time()
        PASSES[asked.run](asked.folder, asked.formats)
        print(time.perf_counter() - start, time.process_time() - cpu_start, peak_gb())
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as directory:
        folder = Path(directory)
        size = write_checkpoint(folder, asked.gb)
        found = {kind: [] for kind in PASSES}
        for _ in range(asked.passes):
            for kind in PASSES:
                found[kind].append(run(kind, folder, asked.formats))
    best = {kind: min(wall for wall, _, _ in passes) for kind, passes in found.items()}
    cpu = {kind: min(cpu for _, cpu, _ in passes) for kind, passes in found.items()}
    result = {
        "checkpoint_gb": round(size / 1e9, 2),
        "formats": asked.formats.split(","),
        "profile_s": round(best["profile"], 1),
        "statistics_alone_s": round(best["statistics"], 1),
        "absmax_s": round(best["absmax"], 1),
        "profile_gb_per_s": round(size / 1e9 / best["profile"], 3),
        "absmax_gb_per_s": round(size / 1e9 / best["absmax"], 3),
        "ratio": round(best["absmax"] / best["profile"], 3),
        "goal_ratio": GOAL_RATIO,
        "profile_cpu_s": round(cpu["profile"], 1),
        "statistics_alone_cpu_s": round(cpu["statistics"], 1),
        "absmax_cpu_s": round(cpu["absmax"], 1),
        "cpu_ratio": round(cpu["absmax"] / cpu["profile"], 3),
        "profile_peak_rss_gb": round(max(peak for _, _, peak in found["profile"]), 2),
        "absmax_peak_rss_gb": round(max(peak for _, _, peak in found["absmax"]), 2),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[2], 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "versions": dict(versions()),
    }
    write_json(asked.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
