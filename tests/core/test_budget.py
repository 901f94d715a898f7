"""Budgets: the optimum against scipy's, effective parameters against the baseline itself."""

import json

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from bitplan.budget import CHOICES, LOSSLESS, for_compute, for_serving
from bitplan.cli import EXIT_BAD_INPUT, main
from bitplan.errors import BitplanError
from bitplan.law import PAPER


@given(st.floats(1e17, 1e25), st.sampled_from([32, 128, 256]))
def test_the_best_n_is_where_an_independent_search_finds_it(flops: float, g: int) -> None:
    for row in for_compute(flops, g).rows:

        def loss(log_n: float, precision: str = row["precision"]) -> float:
            n = 10**log_n
            d = flops / (6 * n)
            delta = 0.0 if precision == LOSSLESS else PAPER.delta(precision, n, d, g)
            return PAPER.baseline.loss(n, d) + delta

        best = minimize_scalar(loss, bounds=(5, 14), method="bounded", options={"xatol": 1e-6})
        assert row["loss"] == pytest.approx(best.fun, rel=1e-9)
        assert 6 * row["params"] * row["tokens"] == pytest.approx(flops)


@given(st.floats(1e6, 1e12), st.floats(1e8, 1e13), st.sampled_from([32, 128, 256]))
def test_a_served_model_fills_its_bytes_and_is_worth_its_loss(b: float, d: float, g: int) -> None:
    rows = for_serving(b, d, g).rows
    assert {row["precision"] for row in rows} == {choice.precision for choice in CHOICES}
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    for row in rows:
        bits = (8 if row["precision"] == LOSSLESS else 4) + 16 / g
        assert row["params"] * bits / 8 == pytest.approx(b)
        assert row["bytes"] == pytest.approx(b)
        same = PAPER.baseline.loss(row["effective_params"], d)
        assert same == pytest.approx(row["loss"], rel=1e-9)


def test_four_bits_pay_while_they_are_worth_more_than_half() -> None:
    # At equal bytes 4 bits have nearly twice the parameters, so worth decides the order.
    rows = {row["precision"]: row for row in for_serving(1e9, 100e9, 128).rows}
    share = rows[LOSSLESS]["params"] / rows["w4a4"]["params"]
    pays = rows["w4a4"]["loss"] < rows[LOSSLESS]["loss"]
    assert pays == (rows["w4a4"]["effective_parameter_multiplier"] > share)
    assert pays
    assert rows["w4a4+fc2"]["loss"] < rows["w4a4"]["loss"]


def test_the_command_takes_one_budget_and_marks_extrapolation() -> None:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["law", "budget", *arguments])

    by_flops = run("--flops", "1e20", "--json")
    assert by_flops.exit_code == 0, by_flops.output
    # 989.4e12 a second at 40 %: so many hours are 1e20 operations.
    hours = 1e20 / (989.4e12 * 0.4 * 3600)
    by_hours = run("--gpu-hours", str(hours), "--json")
    first, second = (json.loads(r.stdout)["rows"][0] for r in (by_flops, by_hours))
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    by_bytes = run("--bytes", "1e9", "--tokens", "2e10", "--json")
    by_bits = run("--weight-bits", "8e9", "--tokens", "2e10", "--json")
    assert by_bytes.stdout == by_bits.stdout
    assert "* extrapolation: params" in run("--flops", "1e24").output
    inside = run("--flops", f"{6 * 3e8 * 5e10}", "--params", "3e8")
    assert "extrapolation" not in inside.output
    for wrong in ((), ("--flops", "1e20", "--bytes", "1"), ("--bytes", "1e9"), ("--flops", "-1")):
        assert run(*wrong).exit_code == EXIT_BAD_INPUT
    unknown = run("--gpu-hours", "1", "--gpu", "abacus")
    assert "no rates of a device 'abacus'" in unknown.output


@pytest.mark.parametrize("flops", [0.0, float("nan"), float("inf")])
def test_impossible_budgets_are_refused(flops: float) -> None:
    with pytest.raises(BitplanError):
        for_compute(flops, 128)
    with pytest.raises(BitplanError):
        for_serving(flops, 1e9, 128)
