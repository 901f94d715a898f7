"""Training small models on a GPU: steps as written, replayed as a CUDA graph, and compiled for it.

    python benchmarks/captured_step.py [--workers 1,4] [--sizes 3M,11M]

Llama-style models from 1M to 30M non-embedding parameters with a vocabulary of 4,096, on random
tokens, through train_arm: bf16 and w4a4 (int4-g128), tokens per second over the steps after the
capture. `workers` processes train side by side on the one GPU, and their rates add up.
"""

import argparse
import itertools
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.formats import parse_format
from bitplan.probe.modules import find_linears
from bitplan.qat import record, training
from bitplan.qat.job import Job
from bitplan.qat.recipe import Recipe
from bitplan.qat.step import WARMUP_STEPS, Step
from bitplan.qat.train import make_accelerator, train_arm
from bitplan.rundir import RunDir, versions, write_json
from bitplan.sites import OPERANDS, PLANNED_ROLES

RESULT = Path(__file__).parent / "results" / "captured_step.json"
SIZES = {"1M": (5, 128), "3M": (4, 256), "11M": (6, 384), "31M": (10, 512)}
"""Blocks and hidden size; the MLP is 8/3 as wide, in multiples of 128."""
STEPS = 60
FIRST = WARMUP_STEPS + 5


def model(size: str) -> LlamaForCausalLM:
    layers, hidden = SIZES[size]
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 128) * 128,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


WAYS = {"written": (False, False), "captured": (True, False), "compiled": (True, True)}


def rate(size: str, arm: str, way: str, batch_size: int, seq_len: int) -> float:
    """Return tokens per second of one training."""
    plain = model(size)
    fmt = parse_format("int4-g128")
    formats = {
        item.linear.site(operand): fmt
        for item in find_linears(plain)
        for operand in OPERANDS
        if item.linear.role in PLANNED_ROLES and arm == "w4a4"
    }
    recipe = Recipe(steps=STEPS, batch_size=batch_size, seq_len=seq_len, lr=1e-3, records=1)
    captured, compiled = WAYS[way]
    recipe = replace(recipe, compiled=compiled)
    job = Job(
        arm=arm,
        seed=0,
        formats=formats,
        quantizers={},
        recipe=recipe,
        train=torch.randint(0, 4096, (STEPS * batch_size, seq_len)),
        heldout=torch.randint(0, 4096, (batch_size, seq_len)),
    )

    def step(*args, capture, **named):  # type: ignore[no-untyped-def]
        return Step(*args, capture=capture and captured, **named)

    with tempfile.TemporaryDirectory() as place, patch.object(training, "Step", step):
        run = RunDir.create(Path(place) / "run")
        train_arm(run, plain, job, make_accelerator(torch.device("cuda")))
        seconds = run.read_table(f"{record.arm_dir(arm, 0)}/{record.METRICS_FILE}")["seconds"]
    taken = float(seconds[STEPS - 2] - seconds[FIRST])  # the last step is recorded
    return (STEPS - 2 - FIRST) * batch_size * seq_len / taken


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", default="1,4")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    sizes = asked.sizes.split(",")
    rows = []
    for workers in map(int, asked.workers.split(",")):
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for size, arm, way in itertools.product(sizes, ("bf16", "w4a4"), WAYS):
                case = (size, arm, way, asked.batch_size, asked.seq_len)
                rates = pool.starmap(rate, [case] * workers, chunksize=1)
                rows.append(
                    {
                        "size": size,
                        "arm": arm,
                        "way": way,
                        "workers": workers,
                        "tokens_per_s": round(sum(rates)),
                    }
                )
                print(rows[-1], flush=True)
    result = {
        "rows": rows,
        "batch_size": asked.batch_size,
        "seq_len": asked.seq_len,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": torch.cuda.get_device_name(),
        "versions": versions(),
    }
    write_json(asked.output, result)


if __name__ == "__main__":
    main()
