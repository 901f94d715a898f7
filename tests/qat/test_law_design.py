"""Further trainings: closed forms against inverses, the greedy choice against brute force."""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bitplan.cli import EXIT_BAD_INPUT, main
from bitplan.errors import BitplanError, FitError
from bitplan.qat.law_design import ALL, EXPONENTS, beyond, design_law, gain
from bitplan.qat.law_fit import cells_of, fit
from bitplan.qat.law_runs import deltas
from bitplan.qat.rates import expected_rate

from .test_law_fit import GROUPS, PARAMS, TOKENS, trainings

RATE = 4e14


@given(
    st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=1, max_size=6),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.floats(0.01, 100),
    st.sampled_from(EXPONENTS),
)
def test_the_gain_is_that_of_the_inverse(
    rows: list[list[float]], x: list[float], weight: float, exponent: str
) -> None:
    a = np.array(rows)
    before = a.T @ a + np.eye(4)
    after = before + weight * np.outer(x, x)
    i = EXPONENTS.index(exponent) + 1
    inverse = np.linalg.inv(before)
    fall = inverse[i, i] - np.linalg.inv(after)[i, i]
    assert gain(inverse, np.array(x), weight, exponent) == pytest.approx(fall, abs=1e-9)
    grown = np.linalg.slogdet(after)[1] - np.linalg.slogdet(before)[1]
    assert gain(inverse, np.array(x), weight, ALL) == pytest.approx(grown, abs=1e-9)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "trainings.parquet"
    trainings(noise=0.002, seeds=2, precisions=("w4a4",)).write_parquet(path)
    return path


def test_the_first_training_is_the_best_of_all(table: Path) -> None:
    """Brute force: the covariance of every candidate, from the Jacobian of log delta by itself."""
    found = design_law([table], exponent="gamma_d", steps=1, flops_per_second=RATE, bootstraps=0)
    cells = cells_of(deltas(pl.read_parquet(table)))
    fitted = fit(cells, bootstraps=0).estimate
    noise = cells.stderr[0] * math.sqrt(2)

    def delta(n: float, d: float, g: float) -> float:
        top = fitted["k"] * d ** fitted["gamma_d"] * math.log2(g) ** fitted["gamma_g"]
        return float(top / n ** fitted["gamma_n"])

    def jacobian(n: float, d: float, g: float) -> list[float]:
        return [1.0, -math.log(n), math.log(d), math.log(math.log2(g))]

    at_hand = {(float(n), float(d), float(g)): 2 for n in PARAMS for d in TOKENS for g in GROUPS}

    def variance(seeds: dict[tuple[float, float, float], int]) -> float:
        total = np.zeros((4, 4))
        for cell, count in seeds.items():
            s = 0.05**2 + (noise / delta(*cell)) ** 2 / count
            total += np.outer(jacobian(*cell), jacobian(*cell)) / s
        return float(np.linalg.inv(total)[2, 2])

    now = variance(at_hand)
    values = {}
    for n in beyond(np.array(PARAMS)):
        for d in beyond(np.array(TOKENS)):
            for g in map(float, GROUPS):
                cell = (n, d, g)
                more = {**at_hand, cell: at_hand.get(cell, 0) + 1}
                hours = (
                    2 * 6 * n * d / RATE / 3600
                )  # each needs a bf16: a new seed, or a new (N, D)
                values[cell] = (now - variance(more)) / hours
    best = max(values, key=lambda cell: values[cell])
    step = found.steps[0]
    chosen = (step.params, step.tokens, step.group_size)
    assert values[chosen] == pytest.approx(values[best], rel=1e-6)
    assert step.with_bf16


def test_widths_fall_with_every_step_and_a_shared_bf16_is_paid_once(table: Path) -> None:
    found = design_law([table], steps=12, flops_per_second=RATE, bootstraps=30)
    widths = [found.widths, *(step.widths for step in found.steps)]
    for name in EXPONENTS:
        column = [w[name] for w in widths]
        assert column == sorted(column, reverse=True)
    fitted = fit(cells_of(deltas(pl.read_parquet(table))), bootstraps=30)
    for name in EXPONENTS:  # widths at hand are the bootstrap's
        assert found.widths[name] == pytest.approx(fitted.high[name] - fitted.low[name])
    paid = [(s.params, s.tokens, s.seed) for s in found.steps if s.with_bf16]
    assert len(paid) == len(set(paid))
    for step in found.steps:
        alone = 6 * step.params * step.tokens / RATE / 3600
        assert step.hours == pytest.approx(alone * (2 if step.with_bf16 else 1))


def test_few_cells_would_have_done(table: Path) -> None:
    found = design_law([table], steps=1, flops_per_second=RATE, bootstraps=0)
    assert 6 <= found.enough < found.cells
    for name in EXPONENTS:
        assert found.enough_estimate[name] == pytest.approx(found.estimate[name], abs=0.15)


def test_hours_follow_from_measured_rates_where_there_are_any(table: Path) -> None:
    frame = pl.read_parquet(table).with_columns(tokens_per_second=pl.lit(1000.0))
    frame.write_parquet(table)
    found = design_law([table], steps=3, flops_per_second=RATE, bootstraps=0)
    assert found.measured_rates
    for step in found.steps:
        slower = max(1.0, step.params / max(PARAMS))
        alone = step.tokens / 1000 / 3600 * slower
        assert step.hours == pytest.approx(alone * (2 if step.with_bf16 else 1))


def test_an_arm_of_a_trunk_costs_its_own_tokens(table: Path) -> None:
    frame = pl.read_parquet(table)
    own = int(frame["tokens"].min()) // 2  # type: ignore[arg-type]
    trunks = {"trunk_tokens": pl.col("tokens") - own, "trunk": pl.lit("weights")}
    frame.with_columns(**trunks).write_parquet(table)
    found = design_law([table], steps=3, flops_per_second=RATE, bootstraps=0)
    for step in found.steps:
        alone = 6 * step.params * own / RATE / 3600
        assert step.hours == pytest.approx(alone * (2 if step.with_bf16 else 1))


def test_a_rate_is_that_of_the_nearest_model() -> None:
    rates = {1_000: [10.0, 30.0, 20.0], 1_000_000: [1.0]}
    assert expected_rate(rates, 1_000) == 20.0
    assert expected_rate(rates, 500) == 20.0
    assert expected_rate(rates, 2_000) == 10.0
    assert expected_rate(rates, 2_000_000) == 0.5


def test_the_command_says_what_to_train(table: Path) -> None:
    asked = ["law", "design", str(table), "--exponent", "gamma_g", "--steps", "2"]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    assert "narrow the interval of gamma_g" in result.output
    assert "cells would have given intervals" in result.output
    value = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    assert len(value["steps"]) == 2
    narrow = CliRunner().invoke(main, [*asked, "--params", "1e6", "--tokens", "5e7", "--json"])
    assert {s["params"] for s in json.loads(narrow.stdout)["steps"]} == {1e6}
    wrong = CliRunner().invoke(main, ["law", "design", str(table), "--exponent", "k"])
    assert wrong.exit_code == EXIT_BAD_INPUT


def test_what_cannot_be_fitted_cannot_be_designed(table: Path) -> None:
    with pytest.raises(FitError, match="there are w4a4"):
        design_law([table], precision="w4a16", flops_per_second=RATE)
    with pytest.raises(BitplanError, match="no exponent"):
        design_law([table], exponent="alpha", flops_per_second=RATE)
