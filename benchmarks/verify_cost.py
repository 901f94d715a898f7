"""What fake quantization costs: the time of a training step of every arm over that of bf16.

    python benchmarks/verify_cost.py CHECKPOINT [--plan PLAN.json] [--rounds 5] [--threads 2]

Steps of the arms alternate and the least time of each counts, so that other work on the machine
disturbs all of them alike. Without a plan, the paper's rule: every FC2 input at 8 bits, the rest at
4. CPU seconds are those of all threads together.
"""

import argparse
import copy
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from bitplan.formats import Format, parse_format
from bitplan.planner.plan import Plan
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.modules import find_linears
from bitplan.qat.arms import ARMS
from bitplan.qat.convert import convert
from bitplan.qat.recipe import sequence_losses
from bitplan.rundir import read_json
from bitplan.sites import PLANNED_ROLES, Site

LOW, HIGH = parse_format("int4-g128"), parse_format("int8-g128")


def without_plan(model: nn.Module) -> dict[str, Mapping[Site, Format]]:
    linears = [m.linear for m in find_linears(model) if m.linear.role in PLANNED_ROLES]
    weights = {linear.site("weight"): LOW for linear in linears}
    inputs = {linear.site("input"): LOW for linear in linears}
    rule = {linear.site("input"): HIGH if linear.role == "fc2" else LOW for linear in linears}
    return {
        "bf16": {},
        "w4a16": weights,
        "w16a4": inputs,
        "w4a4": weights | inputs,
        "planned": weights | rule,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_checkpoint(options.checkpoint, device="cpu").model
    if options.plan is None:
        arms = without_plan(model)
    else:
        plan = Plan.from_json(read_json(options.plan))
        arms = {name: arm.formats(plan) for name, arm in ARMS.items()}
    vocabulary = model.get_input_embeddings().num_embeddings
    shape = (options.batch_size, options.seq_len)
    ids = torch.randint(0, vocabulary, shape, generator=torch.manual_seed(0))
    ready = {}
    for name, formats in arms.items():
        converted = copy.deepcopy(model)
        converted.config.use_cache = False
        convert(converted, formats)
        ready[name] = (converted, torch.optim.AdamW(converted.parameters(), lr=1e-6, fused=True))
    wall = dict.fromkeys(ready, float("inf"))
    cpu = dict.fromkeys(ready, float("inf"))
    for _ in range(options.rounds + 1):  # the first warms up and is the slowest
        for name, (converted, optimizer) in ready.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            sequence_losses(converted, ids).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            wall[name] = min(wall[name], time.perf_counter() - wall_start)
            cpu[name] = min(cpu[name], time.process_time() - cpu_start)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, {shape}")
    print(f"{'arm':16} {'s a step':>9} {'CPU s':>9} {'CPU over bf16':>14}")
    for name in ready:
        print(f"{name:16} {wall[name]:9.3f} {cpu[name]:9.3f} {cpu[name] / cpu['bf16']:14.2f}")


if __name__ == "__main__":
    main()
