"""How long the planner takes: 2,000 sites, 6 formats, 3 budgets, and a frontier of 50 points.

    OMP_NUM_THREADS=1 python benchmarks/planner_speed.py

Instances are synthetic (lognormal sensitivities, the shapes of a 143-block Llama-like model), one
process on one core; `_s` is wall-clock time, `_cpu_s` the process's own. `average` limits input
bits, weight bits and bytes, which add up over sites; `pairs` limits bit operations in place of
bytes, which needs a variable per pair of formats; its frontier is not timed (50 times the solve,
which HiGHS does alone). The rest is either with more to respect: budgets just above the cheapest
plan, shares of roles, one format per role.
Writes benchmarks/results/planner_speed.json.
"""

import datetime
import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitplan.formats import parse_format
from bitplan.planner.budgets import BUDGETS, Limit, objective
from bitplan.planner.frontier import frontier
from bitplan.planner.problem import Problem, read_problem
from bitplan.planner.search import Search
from bitplan.rundir import hardware, versions
from bitplan.sites import Linear, describe
from bitplan.tables import ERRORS, PROFILE, SENSITIVITY

FORMATS = ("int4-g128", "int4-g32", "nvfp4", "int6-g128", "int8-g128", "bf16")
SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (2048, 512),
    "self_attn.v_proj": (2048, 512),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (2048, 5632),
    "mlp.up_proj": (2048, 5632),
    "mlp.down_proj": (5632, 2048),
}
BLOCKS = 143
POINTS = 50
SEEDS = tuple(range(14))
FEW = SEEDS[:4]
AVERAGE = {"input_bits": 5.0, "weight_bits": 4.6, "bytes": 0.999}
PAIRS = {"input_bits": 5.0, "weight_bits": 4.6, "bit_ops": 0.98}
SHARES = {"shares": ("*down_proj:input=int8-g128>=0.5", "*:weight=int8-g128<=0.05")}


@dataclass(frozen=True)
class Case:
    """What is asked of a problem, and of how many."""

    limits: dict[str, float]
    seeds: tuple[int, ...] = FEW
    respects: dict[str, Any] = field(default_factory=dict)


CASES = {
    "average": Case(AVERAGE),
    "pairs": Case(PAIRS, SEEDS),
    "average, tight": Case({"input_bits": 4.14, "weight_bits": 4.14, "bytes": 0.9999}),
    "pairs, tight": Case({"input_bits": 4.2, "weight_bits": 4.2, "bit_ops": 0.99}),
    "average, shares": Case(AVERAGE, respects=SHARES),
    "pairs, shares": Case(PAIRS, respects=SHARES),
    "average, per role": Case(AVERAGE, respects={"per_role": True}),
}
RESULTS = Path(__file__).parent / "results" / "planner_speed.json"


def make_problem(seed: int, *, fuse: bool, **respects: Any) -> Problem:
    """Return an instance of BLOCKS blocks; without fusion every linear decides alone.

    respects: further arguments of read_problem.
    """
    rng = np.random.default_rng(seed)
    names = [
        (f"model.layers.{b}.{name}", *shape)
        for b in range(BLOCKS)
        for name, shape in SHAPES.items()
    ]
    linears = describe([Linear(*name) for name in names], family="llama")
    profile, errors, sensitivity = [], [], []
    for linear in linears:
        for operand in ("weight", "input"):
            site = f"{linear.module}:{operand}"
            facts = {
                key: getattr(linear, key)
                for key in ("module", "role", "block", "expert", "in_features", "out_features")
            }
            fused = linear.fused if fuse else None
            profile.append(
                {
                    **facts,
                    "site": site,
                    "operand": operand,
                    "fused": fused,
                    "step": 0,
                    "tokens": 1000,
                    "kurtosis": 10 ** rng.uniform(0.5, 2.5),
                }
            )
            harm = 10 ** rng.normal(-4, 1)
            for name in FORMATS[:-1]:
                size = 4.0 ** (4 - parse_format(name).bits) * 10 ** rng.normal(0, 0.1)
                errors.append(
                    {"site": site, "step": 0, "format": name, "relative_error": 0.01 * size}
                )
                sensitivity.append(
                    {"site": site, "format": name, "method": "gradient", "delta_loss": harm * size}
                )
    return read_problem(
        PROFILE.frame(profile),
        ERRORS.frame(errors),
        SENSITIVITY.frame(sensitivity),
        formats=FORMATS,
        **respects,
    )


def make_limits(problem: Problem, wanted: dict[str, float]) -> list[Limit]:
    """Return the limits; those below 2 are shares of what the other limits alone would use."""
    absolute = [Limit(budget=BUDGETS[k], value=v) for k, v in wanted.items() if v > 2]
    free = Search(problem, objective(problem), [x.cost(problem) for x in absolute]).solve(
        [x.value for x in absolute]
    )
    assert free is not None
    shares = [
        Limit(
            budget=BUDGETS[k], value=v * BUDGETS[k].cost(problem, None).total(problem, free.choice)
        )
        for k, v in wanted.items()
        if v <= 2
    ]
    return [*absolute, *shares]


def measure(seed: int, name: str, *, fuse: bool) -> dict[str, Any]:
    """Time one solve from the problem on, and a frontier of POINTS points over input bits."""
    case = CASES[name]
    problem = make_problem(seed, fuse=fuse, **case.respects)
    limits = make_limits(problem, case.limits)
    start, cpu = time.perf_counter(), time.process_time()
    costs = [limit.cost(problem) for limit in limits]
    found = Search(problem, objective(problem), costs).solve([limit.value for limit in limits])
    solve_s, solve_cpu_s = time.perf_counter() - start, time.process_time() - cpu
    assert found is not None
    points, frontier_s, frontier_cpu_s = 0, None, None
    if name == "average":
        start, cpu = time.perf_counter(), time.process_time()
        rows = frontier(problem, limits[0], limits[1:], found.choice, POINTS)
        frontier_s = round(time.perf_counter() - start, 3)
        frontier_cpu_s = round(time.process_time() - cpu, 3)
        points = len(rows.filter(rows["label"] == "optimal"))
    return {
        "limits": name,
        "fused": fuse,
        "seed": seed,
        "sites": len(problem.sites),
        "formats": len(FORMATS),
        "solve_s": round(solve_s, 3),
        "solve_cpu_s": round(solve_cpu_s, 3),
        "gap": found.gap,
        "frontier_points": points,
        "frontier_s": frontier_s,
        "frontier_cpu_s": frontier_cpu_s,
    }


def main() -> None:
    """Run every case and write the results."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cases = []
    for name, case in CASES.items():
        for fuse in (False, True):
            for seed in case.seeds:
                cases.append(measure(seed, name, fuse=fuse))
                print(cases[-1])
    summary: dict[str, float] = {}
    for name in CASES:
        for fuse in (False, True):
            mine = [c for c in cases if (c["limits"], c["fused"]) == (name, fuse)]
            for key in ("solve_s", "solve_cpu_s", "frontier_s", "frontier_cpu_s"):
                if values := [c[key] for c in mine if c[key] is not None]:
                    label = f"{name}, {'fused' if fuse else 'not fused'}, {key}"
                    summary[f"{label}, median"] = statistics.median(values)
                    summary[f"{label}, worst"] = max(values)
    result = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/planner_speed.py",
        "commit": subprocess.check_output(("git", "rev-parse", "HEAD"), text=True).strip(),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{hardware()}, one of them used",
        "load_average_1min": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "summary": summary,
        "cases": cases,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
