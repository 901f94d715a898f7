"""The law's forecast in a plan: its numbers by hand, predictions at its scale, and what shifts."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from bitplan import law_choice
from bitplan.errors import BitplanError, PlanError
from bitplan.law import PAPER, Grid, write_laws
from bitplan.law_choice import shipped
from bitplan.options import PlanOptions
from bitplan.planner.explain import explain_sites
from bitplan.planner.plan import read_plan
from bitplan.planner.stage import make_plan
from bitplan.rundir import RunDir

N, D = 297e6, 50e9


@pytest.fixture
def run(tables: Callable[..., Any], tmp_path: Path) -> Path:
    return tables(4).write(tmp_path / "run")


def delta(
    k: float, n: float, d: float, g: float, params: float, tokens: float, size: float
) -> float:
    """Take the constants of the paper's table in the order k, N, D, G."""
    return k * tokens**d * math.log2(size) ** g / params**n


def by_hand(params: float, tokens: float, size: float) -> dict[str, float]:
    return {
        "delta_weights": delta(0.2522, 0.3589, 0.1610, 0.3533, params, tokens, size),
        "delta_inputs": delta(0.1004, 0.1816, 0.0331, 0.9812, params, tokens, size),
        "delta_inputs_fc2_at_8": delta(0.1273, 0.2347, 0.0827, 0.4491, params, tokens, size),
    }


def mean_group(run: Path, operand: str, size: int) -> float:
    rows = pl.read_parquet(run / "profile.parquet").filter(
        pl.col("role").is_in(["qkv", "o", "fc1", "fc2"]), operand=operand
    )
    weights = [a * b for a, b in rows.select("in_features", "out_features").iter_rows()]
    groups = [min(size, a) for a in rows["in_features"]]
    return sum(w * g for w, g in zip(weights, groups, strict=True)) / sum(weights)


def test_the_forecast_is_the_papers(run: Path) -> None:
    made = make_plan(run, PlanOptions(tokens=D, params=N))
    advice = made.plan.advice
    assert advice is not None
    size = mean_group(run, "input", 128)
    assert advice["input_group_size"] == pytest.approx(size)
    expected = by_hand(N, D, size)
    assert {key: advice[key] for key in expected} == pytest.approx(expected)
    assert advice["R"] == pytest.approx(expected["delta_inputs"] / expected["delta_weights"])
    crossed = by_hand(N, advice["crossover_tokens"], size)
    assert crossed["delta_inputs"] == pytest.approx(crossed["delta_weights"])
    crossed = by_hand(N, advice["crossover_tokens_fc2_at_8"], size)
    assert crossed["delta_inputs_fc2_at_8"] == pytest.approx(crossed["delta_weights"])
    assert advice["extrapolates"] == []
    text = " ".join(made.as_text().split())
    assert "law: 2.97e+08 parameters and 5e+10 tokens" in text
    assert f"next bit: {advice['next_bit']}" in text
    assert "extrapolation" not in text
    assert read_plan(RunDir.open(run)) == made.plan
    assert json.loads((run / "plan.json").read_text())["advice"] == advice


@pytest.mark.parametrize("tokens", [10e9, 100e9, 1e13])
def test_uniform_plans_cost_what_the_law_forecasts(run: Path, tokens: float) -> None:
    expected = by_hand(N, tokens, mean_group(run, "input", 128))
    uniform = make_plan(run, PlanOptions(rule="uniform", tokens=tokens, params=N)).plan.predicted
    fc2 = make_plan(run, PlanOptions(rule="fc2", tokens=tokens, params=N)).plan.predicted
    assert uniform.delta_loss_weights == pytest.approx(expected["delta_weights"])
    assert uniform.delta_loss_inputs == pytest.approx(expected["delta_inputs"])
    assert fc2.delta_loss_inputs == pytest.approx(expected["delta_inputs_fc2_at_8"])


def test_without_an_8_bit_format_all_inputs_have_one_factor(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    run = tables(3, formats=("int4-g128", "int4-g32")).write(tmp_path / "run")
    options = PlanOptions(rule="uniform", formats=("int4-g128", "int4-g32"), tokens=D, params=N)
    plan = make_plan(run, options).plan
    assert plan.advice is not None
    assert plan.advice["factors"]["fc2_inputs"] == plan.advice["factors"]["other_inputs"]
    assert plan.predicted.delta_loss_inputs == pytest.approx(plan.advice["delta_inputs"])


def test_more_tokens_move_bits_from_inputs_to_weights(run: Path) -> None:
    """One budget that both operands share: the law's R falls with D, and the choice follows."""
    bits = {}
    for tokens in (1e9, 1e14):
        plan = make_plan(run, PlanOptions(bit_ops=3.2e6, tokens=tokens, params=N)).plan
        assert plan.predicted.input_bits is not None
        bits[tokens] = (plan.predicted.input_bits, plan.predicted.weight_bits)
    assert bits[1e14][0] < bits[1e9][0]
    assert bits[1e14][1] > bits[1e9][1]
    # A limit on weights alone leaves nothing to shift among them.
    plans = [make_plan(run, PlanOptions(weight_bits=4.8, tokens=t, params=N)) for t in bits]
    weights = [{s: f for s, f in p.plan.assignment.items() if "weight" in s} for p in plans]
    assert weights[0] == weights[1]


def test_converge_needs_fewer_input_bits_with_more_tokens(run: Path) -> None:
    found = []
    for tokens in (1e9, 1e14):
        p = make_plan(run, PlanOptions(converge=True, tokens=tokens, params=N)).plan.predicted
        assert p.R is not None
        assert p.R <= 1 + 1e-9
        found.append(p.input_bits)
    assert found[1] < found[0]


def test_the_next_bit_is_the_steepest_step(run: Path) -> None:
    """Try every single decision by pinning, and divide what it saves by the bits it adds."""
    base = make_plan(run, PlanOptions(rule="uniform", tokens=D, params=N)).plan
    best = {"input": 0.0, "weight": 0.0}
    decisions = [
        f"model.layers.{b}.{part}:{operand}"
        for b in range(4)
        for operand in best
        for part in ("self_attn.[qkv]_proj", "self_attn.o_proj", "mlp.[gu]*_proj", "mlp.down_proj")
    ]
    for glob in decisions:
        pins = (f"{glob}=int8-g128",)
        p = make_plan(
            run, PlanOptions(rule="uniform", tokens=D, params=N, pins=pins)
        ).plan.predicted
        operand = glob.rpartition(":")[2]
        added = getattr(p, f"{operand}_bits") - getattr(base.predicted, f"{operand}_bits")
        assert base.predicted.delta_loss is not None
        assert p.delta_loss is not None
        best[operand] = max(best[operand], (base.predicted.delta_loss - p.delta_loss) / added)
    assert base.advice is not None
    assert base.advice["saves_per_input_bit"] == pytest.approx(best["input"])
    assert base.advice["saves_per_weight_bit"] == pytest.approx(best["weight"])
    assert base.advice["next_bit"] == ("inputs" if best["input"] > best["weight"] else "weights")


def test_without_tokens_nothing_changes(run: Path) -> None:
    plan = make_plan(run, PlanOptions(input_bits=5.0))
    assert plan.plan.advice is None
    assert "law:" not in plan.as_text()
    assert "factor" not in " ".join(plan.plan.notes)


def test_without_sensitivity_the_forecast_is_said_and_changes_no_choice(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    made = tables(3)
    made.sensitivity = None
    run = made.write(tmp_path / "run")
    free = make_plan(run, PlanOptions(input_bits=5.0)).plan
    result = make_plan(run, PlanOptions(input_bits=5.0, tokens=D, params=N))
    assert result.plan.plan_id == free.plan_id
    advice = result.plan.advice
    assert advice is not None
    assert (advice["factors"], advice["saves_per_input_bit"]) == (None, None)
    assert advice["next_bit"] == ("inputs" if advice["R"] > 1 else "weights")
    assert "the forecast R is" in result.as_text()


def test_weights_alone_are_scaled_too(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(3, inputs=False).write(tmp_path / "run")
    plan = make_plan(run, PlanOptions(rule="uniform", tokens=D, params=N)).plan
    expected = by_hand(N, D, mean_group(run, "weight", 128))["delta_weights"]
    assert plan.predicted.delta_loss == pytest.approx(expected)
    assert plan.advice is not None
    assert plan.advice["saves_per_input_bit"] is None


def test_params_default_to_the_checkpoints_and_extrapolation_is_marked(run: Path) -> None:
    with pytest.raises(PlanError, match="--params N"):
        make_plan(run, PlanOptions(tokens=D))
    path = run / "run.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["num_non_embedding_parameters"] = 2_000_000
    path.write_text(json.dumps(manifest))
    result = make_plan(run, PlanOptions(tokens=1e6, law="paper"))
    assert result.plan.advice is not None
    assert result.plan.advice["params"] == 2e6
    assert [x.partition(" is outside")[0] for x in result.plan.advice["extrapolates"]] == [
        "params 2e+06",
        "tokens 1e+06",
    ]
    assert result.as_text().count("extrapolation: ") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"params": N}, "--params is for the forecast of --tokens"),
        ({"tokens": math.nan, "params": N}, "--tokens nan: give a number"),
        ({"tokens": -1.0, "params": N}, "--tokens -1: give a number"),
        ({"tokens": D, "params": 0.0}, "--params 0: give a number"),
        ({"tokens": D, "params": N, "formats": ("int8-g128",)}, "add one of 4 bits"),
    ],
)
def test_refused(run: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BitplanError, match=said):
        make_plan(run, PlanOptions(**options))


def test_a_fitted_law_takes_the_place_of_the_papers(run: Path, tmp_path: Path) -> None:
    twice = {
        name: replace(law, k=2 * law.k) if name.startswith("w4a16") else law
        for name, law in PAPER.laws.items()
    }
    path = tmp_path / "law.json"
    write_laws(path, replace(PAPER, source="ours", laws=twice))
    asked = PlanOptions(tokens=D, params=N, law=str(path))
    paper = make_plan(run, replace(asked, law=None)).plan.advice
    ours = make_plan(run, asked).plan.advice
    assert paper is not None
    assert ours is not None
    assert ours["source"] == "ours"
    assert ours["delta_weights"] == pytest.approx(2 * paper["delta_weights"])
    assert ours["R"] == pytest.approx(paper["R"] / 2)
    assert make_plan(run, asked).up_to_date
    assert explain_sites(run, "fc2:input").plan.advice == ours
    write_laws(path, replace(PAPER, source="again"))
    assert not make_plan(run, asked).up_to_date
    write_laws(path, replace(PAPER, laws={"w4a4": PAPER.laws["w4a4"]}))
    with pytest.raises(PlanError, match=r"needs laws for w4a16.*it has w4a4"):
        make_plan(run, asked)
    with pytest.raises(PlanError, match="--law is for the forecast of --tokens"):
        make_plan(run, PlanOptions(law=str(path)))


def test_the_shipped_law_that_fits_the_training_is_taken(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laws = tmp_path / "laws"
    grid = Grid(params=(1e6, 1e7), tokens=(2e6, 4e7), group_size=(32, 256))
    origin = {"branched": True}
    small = replace(PAPER, source="12 trainings of ours", grid=grid, provenance=origin)
    write_laws(laws / "small.json", small)
    monkeypatch.setattr(law_choice, "shipped", lambda: shipped(laws))
    asked = PlanOptions(tokens=1e7, params=3e6)
    made = make_plan(run, asked)
    assert made.plan.advice is not None
    assert made.plan.advice["source"] == small.source
    assert made.plan.advice["why"] == "N and D lie within what the small law was fitted on"
    text = " ".join(made.as_text().split())
    assert "QAT from a trained model (12 trainings of ours" in text
    assert "the small law was fitted on" in text
    assert make_plan(run, asked).up_to_date
    large = make_plan(run, replace(asked, tokens=1e11, params=3e8)).plan.advice
    assert large is not None
    assert large["source"] == PAPER.source
    assert not large["branched"]
    # Where the shipped law has changed, the plan that it scaled is made again.
    make_plan(run, asked)
    write_laws(laws / "small.json", replace(small, source="again"))
    assert not make_plan(run, asked).up_to_date


def test_weights_that_never_cost_more_are_told(run: Path, tmp_path: Path) -> None:
    slow = replace(PAPER.laws["w4a16"], gamma_d=0.0)
    write_laws(tmp_path / "law.json", replace(PAPER, laws={**PAPER.laws, "w4a16": slow}))
    made = make_plan(run, PlanOptions(tokens=D, params=N, law=str(tmp_path / "law.json")))
    assert made.plan.advice is not None
    assert made.plan.advice["crossover_tokens"] is None
    assert "never" in made.as_text()
