"""Planted outliers that change nothing: plans follow the measured loss, not the planting.

Rows of up_proj times 64, the matching columns of down_proj over 64: powers of two, so the logits
stay the same to the last bit, while one channel of the input of down_proj takes the scale of its
group and the 127 others lose their resolution at 4 bits. What that costs differs from block to
block, and is measured here for every input of the model.
"""

import itertools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan.formats import parse_format
from bitplan.options import PlanOptions, ProfileOptions
from bitplan.planner.plan import Plan
from bitplan.planner.stage import make_plan
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.interventions import Effect, Intervention, measure_interventions
from bitplan.probe.modules import find_linears
from bitplan.probe.profile import profile_checkpoint
from bitplan.probe.text import load_text, tokenize
from bitplan.rundir import RunDir
from bitplan.sites import PLANNED_ROLES, Site
from bitplan.tables import PROFILE

LOW, HIGH = parse_format("int4-g128"), parse_format("int8-g128")
TEXT = {"tokens": 1024, "seq_len": 256, "seed": 0}
planted = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "planted.py"))
CHANNELS: dict[int, int] = planted["CHANNELS"]
LIMIT = 1.16
"""Bit operations over those of uniform 4-bit: enough for three of the sixteen inputs."""


def down(block: int) -> str:
    return f"model.layers.{block}.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planted") / "checkpoint"
    assert planted["plant"](place) == 0
    return place


@pytest.fixture(scope="module")
def run(checkpoint: Path, prose: Path) -> Path:
    place = checkpoint.parent / "run"
    asked = ProfileOptions(model=str(checkpoint), data=(str(prose),), device="cpu", **TEXT)
    profile_checkpoint(place, asked)
    return place


@pytest.fixture(scope="module")
def plan(run: Path) -> Plan:
    uniform = make_plan(run, PlanOptions(rule="uniform")).plan.predicted.bit_ops
    assert uniform is not None
    return make_plan(run, PlanOptions(bit_ops=LIMIT * uniform)).plan


@pytest.fixture(scope="module")
def effects(checkpoint: Path, prose: Path) -> dict[str, Effect]:
    """Measure every input, with its readers, and the planted weights, one by one at 4 bits."""
    loaded = load_checkpoint(str(checkpoint), device="cpu")
    items = find_linears(loaded.model)
    units: dict[str, dict[Site, Any]] = {}
    for linear in (item.linear for item in items if item.linear.role in PLANNED_ROLES):
        unit = units.setdefault(linear.fused or linear.module, {})
        unit[linear.site("input")] = LOW
    asked = [Intervention(name, sites) for name, sites in units.items()]
    weights = [Site.parse(f"{down(block)}:weight") for block in CHANNELS]
    asked += [Intervention(str(site), {site: LOW}) for site in weights]
    ids = tokenize(load_text((str(prose),)), loaded.tokenizer, "calibration", **TEXT)
    waves = measure_interventions(loaded.model, items, ids, asked)
    return {effect.intervention.name: effect for wave in waves for effect in wave}


def measured_best(effects: dict[str, Effect], run: Path) -> set[str]:
    """Return the sites whose raising saves most measured loss, by trying all subsets."""
    rows = RunDir.open(run).read_table(PROFILE.file).filter(operand="input").iter_rows(named=True)
    macs = {row["module"]: row["in_features"] * row["out_features"] for row in rows}
    units = [sorted(effect.intervention.formats, key=str) for effect in effects.values()]
    price = np.array([sum(macs[site.module] for site in sites) for sites in units], float)
    total = sum(p for p, (site, *_) in zip(price, units, strict=True) if site.operand == "input")
    subsets = np.array(list(itertools.product([False, True], repeat=len(units))))
    cost = 1 + subsets @ price / total
    for block in CHANNELS:  # 8 x 8 bits cost four times 4 x 4, where each alone costs twice
        both = [k for k, (site, *_) in enumerate(units) if site.module == down(block)]
        cost += subsets[:, both].all(axis=1) * macs[down(block)] / total
    saved = subsets @ np.array([effect.delta_loss for effect in effects.values()])
    best = subsets[np.argmax(np.where(cost <= LIMIT, saved, -np.inf))]
    return {str(site) for sites, up in zip(units, best, strict=True) if up for site in sites}


def test_the_plan_agrees_with_exhaustive_measurement_about_planted_layers(
    plan: Plan, effects: dict[str, Effect], run: Path
) -> None:
    inputs, weights = (
        {f"{down(block)}:{operand}" for block in CHANNELS} for operand in ("input", "weight")
    )
    truth = measured_best(effects, run) & (inputs | weights)
    assert len(truth & inputs) == 1, "one planting should cost much and one little"
    assert not truth & weights
    assert {site for site in inputs | weights if plan.assignment[site] == HIGH} == truth


def test_kurtosis_would_raise_a_planted_input_that_costs_less_than_an_untouched_one(
    plan: Plan, run: Path
) -> None:
    rows = RunDir.open(run).read_table(PROFILE.file).filter(operand="input")
    kurtosis = dict(rows.select("site", "kurtosis").iter_rows())
    left = next(b for b in CHANNELS if plan.assignment[f"{down(b)}:input"] == LOW)
    raised = {
        site.site for site in plan.sites if site.operand == "input" and site.format == HIGH
    } - {f"{down(block)}:input" for block in CHANNELS}
    assert raised
    assert all(kurtosis[f"{down(left)}:input"] > 10 * kurtosis[site] for site in raised)
