"""What each alternative chooses: a plan, a rule, a peer's answer, at every budget."""

import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from bitplan.formats import DEFAULT_HIGH, DEFAULT_LOW, Format, parse_format
from bitplan.options import PlanOptions
from bitplan.planner.plan import Plan
from bitplan.planner.stage import make_plan
from bitplan.qat.measure import make_measured_plan
from bitplan.rundir import RunDir, content_hash
from bitplan.sites import OPERANDS, PLANNED_ROLES, Site
from bitplan.tables import ERRORS, PROFILE

LOW, HIGH = parse_format(DEFAULT_LOW), parse_format(DEFAULT_HIGH)
INPUT_BITS = (4.4, 4.75, 5.75, 6.75)
DRAWS = 20
BASELINE = "bf16"
OURS = "bitplan"
# What bitplan is asked for, beside the bit operations.
PLANS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    OURS: lambda uniform: {"weight_bits": uniform.predicted.weight_bits},
    "bitplan, measured": lambda uniform: {
        "weight_bits": uniform.predicted.weight_bits,
        "measure": PlanOptions.DEFAULT_MEASURE,
    },
    "bitplan, weights too": lambda uniform: {},
}
RAISED = {"W4A8": ("input",), "W8A8": ("input", "weight")}
RULES = ("uniform", "fc2", "first-last")


@dataclass(frozen=True)
class Sites:
    """The planned sites of a run: `frame` holds a row each, `raised` means a site at 8 bits."""

    frame: pl.DataFrame

    @classmethod
    def read(cls, run: RunDir) -> "Sites":
        profile = run.read_table(PROFILE.file).filter(
            pl.col("step") == 0, pl.col("role").is_in(PLANNED_ROLES)
        )
        errors = run.read_table(ERRORS.file).filter(pl.col("step") == 0, format=LOW.name)
        own = pl.when(operand="input").then("fused")
        frame = profile.join(errors, on="site", maintain_order="left").select(
            "site", "module", "operand", "role", "block", "kurtosis", "relative_error",
            "in_features", unit=pl.coalesce(own, "module"),
            macs=pl.col("in_features") * pl.col("out_features"),
        )  # fmt: skip
        return cls(frame)

    @property
    def inputs(self) -> pl.DataFrame:
        return self.frame.filter(operand="input")

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates a token by module."""
        return dict(self.inputs.select("module", "macs").iter_rows())

    def cost(self, raised: Iterable[str]) -> float:
        """Return bit operations over those of uniform 4-bit."""
        times = HIGH.bits / LOW.bits
        sites = set(raised)

        def of(module: str) -> float:
            return float(times ** sum(f"{module}:{o}" in sites for o in OPERANDS))

        used = sum(macs * of(module) for module, macs in self.macs.items())
        return used / sum(self.macs.values())

    def bits(self, operand: str, raised: Iterable[str]) -> float:
        """Return an operand's average bits, scales counted, weighted by multiply-accumulates."""
        sites, mine = set(raised), self.frame.filter(operand=operand)
        rows = mine.select("site", "in_features", "macs").iter_rows()
        total = sum(
            macs * (HIGH if site in sites else LOW).effective_bits(width)
            for site, width, macs in rows
        )
        return float(total / mine["macs"].sum())

    def formats(self, raised: Iterable[str]) -> dict[Site, Format]:
        sites = set(raised)
        return {Site.parse(s): HIGH if s in sites else LOW for s in self.frame["site"]}

    def greedy(self, score: Mapping[str, float], limit: float) -> list[str]:
        """Raise inputs, with all their readers, by falling score, each that still fits."""
        raised: list[str] = []
        readers = self.inputs.group_by("unit", maintain_order=True).agg("site")
        for _, sites in sorted(readers.iter_rows(), key=lambda unit: -score[unit[0]]):
            if self.cost([*raised, *sites]) <= limit * (1 + 1e-9):
                raised += sites
        return raised

    def scores(self, expression: pl.Expr) -> dict[str, float]:
        """Return the largest value by unit of inputs."""
        return dict(self.inputs.group_by("unit", maintain_order=True).agg(expression).iter_rows())


def limits(sites: Sites) -> dict[str, float]:
    """Return each budget's bit operations over those of uniform 4-bit."""
    fc2 = [s for s, role in sites.inputs.select("site", "role").iter_rows() if role == "fc2"]
    base = sites.bits("input", [])
    buys = {f"{bits:.2f}": 1 + (bits - base) / LOW.bits for bits in INPUT_BITS}
    buys[f"fc2 ({sites.bits('input', fc2):.2f})"] = sites.cost(fc2)
    return dict(sorted(buys.items(), key=lambda item: item[1]))


def choose(run: Path, peers: Mapping[str, Any]) -> pl.DataFrame:
    """Return a row for every alternative and budget, with the sites it puts at 8 bits."""
    sites = Sites.read(RunDir.open(run))
    rows: list[dict[str, Any]] = []

    def add(name: str, budget: str, raised: Iterable[str], draw: int | None = None) -> None:
        chosen = sorted(raised)
        assert sites.cost(chosen) <= bought[budget] * (1 + 1e-9), (name, budget)
        rows.append(
            {
                "budget": budget,
                "limit": bought[budget],
                "name": name,
                "draw": draw,
                "choice": content_hash({str(s): str(f) for s, f in sites.formats(chosen).items()}),
                "cost": sites.cost(chosen),
                "input_bits": sites.bits("input", chosen),
                "weight_bits": sites.bits("weight", chosen),
                "raised": chosen,
            }
        )

    ends = sites.inputs["block"].max()
    ranked = {
        "ends inward": sites.scores(-pl.min_horizontal("block", ends - pl.col("block")).min()),
        "kurtosis": sites.scores(pl.col("kurtosis").max()),
        "sqnr": sites.scores(pl.col("relative_error").max()),
    }
    bought = limits(sites)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(shutil.copytree(run, Path(folder) / "run"))

        def planned(**options: Any) -> tuple[Plan, list[str]]:
            asked = PlanOptions(**options)
            plan = (make_measured_plan if asked.measure else make_plan)(own, asked).plan
            return plan, [site for site, fmt in plan.assignment.items() if fmt == HIGH]

        uniform, _ = planned(rule="uniform")
        assert uniform.predicted.bit_ops is not None
        rules = {name: planned(rule=name)[1] for name in RULES}
        for budget, limit in bought.items():
            for name, more in PLANS.items():
                ops = uniform.predicted.bit_ops
                plan, raised = planned(bit_ops=limit * ops, **more(uniform))
                assert math.isclose(plan.predicted.bit_ops or 0.0, sites.cost(raised) * ops)
                add(name, budget, raised)
            for name, raised in rules.items():
                if sites.cost(raised) <= limit * (1 + 1e-9):
                    add(name, budget, raised)
    for budget, limit in bought.items():
        for name, score in ranked.items():
            add(name, budget, sites.greedy(score, limit))
        for name, answer in peers.items():
            schemes = answer["choices"][budget].items()
            add(name, budget, [f"{m}:{o}" for m, s in schemes for o in RAISED[s]])
        for draw in range(DRAWS):
            dice = random.Random(f"{budget} {draw}")
            units = dict.fromkeys(sites.inputs["unit"])
            add("random", budget, sites.greedy({u: dice.random() for u in units}, limit), draw)
    return pl.DataFrame(rows)
