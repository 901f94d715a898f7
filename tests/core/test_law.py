import math

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bitplan.cli import EXIT_BAD_INPUT, main
from bitplan.errors import BitplanError
from bitplan.forecast import crossover, predict
from bitplan.law import PAPER

# Derived from the published constants at N = 594.5e6, D = 100e9, to four digits.
TABLE = {
    32: (0.0441, 0.0186, 0.0287, 0.0340, 0.0186),
    128: (0.0573, 0.0210, 0.0400, 0.0381, 0.0216),
    256: (0.0635, 0.0220, 0.0456, 0.0399, 0.0229),
}
COLUMNS = ("w4a4", "w4a16", "w16a4", "w4a4+fc2", "w16a4+fc2")

params = st.floats(1e6, 1e12)
groups = st.sampled_from([2, 32, 100, 256, 4096])


@pytest.mark.parametrize("group_size", TABLE)
def test_the_published_constants_give_the_published_deltas(group_size: int) -> None:
    found = [PAPER.delta(name, 594.5e6, 100e9, group_size) for name in COLUMNS]
    assert found == pytest.approx(TABLE[group_size], abs=1e-4)


@given(params, groups, st.booleans())
def test_r_is_one_at_the_crossover_and_falls_with_tokens(n: float, g: int, fc2: bool) -> None:
    tokens = PAPER.crossover_tokens(n, g, fc2_at_8=fc2)
    assert PAPER.ratio(n, tokens, g, fc2_at_8=fc2) == pytest.approx(1, rel=1e-6)
    assert PAPER.ratio(n, 2 * tokens, g, fc2_at_8=fc2) < 1


@given(params, st.floats(1e7, 1e14), groups)
def test_the_multiplier_is_the_size_of_an_unquantized_model_of_equal_loss(
    n: float, d: float, g: int
) -> None:
    delta = PAPER.delta("w4a4", n, d, g)
    worth = PAPER.baseline.multiplier(n, delta)
    assert PAPER.baseline.loss(worth * n, d) == pytest.approx(
        PAPER.baseline.loss(n, d) + delta, rel=1e-9
    )


def test_a_forecast_says_where_it_extrapolates() -> None:
    inside = predict(594.5e6, 100e9, 128, "w4a4")
    assert inside.extrapolates == ()
    assert [row["precision"] for row in inside.rows] == ["w4a4", "w4a4+fc2"]
    assert inside.R["fc2_inputs_at_8"] == pytest.approx(0.0216 / 0.0210, abs=0.01)
    outside = predict(7e9, 2e12, 512, "w4a16")
    assert len(outside.extrapolates) == 3
    assert "extrapolation: params 7e+09" in outside.as_text()
    assert [row["precision"] for row in outside.rows] == ["w4a16"]


def test_the_crossover_table_has_every_cell() -> None:
    found = crossover([1e8, 1e9], [32, 128])
    assert [(row["params"], row["group_size"]) for row in found.rows] == [
        (1e8, 32),
        (1e8, 128),
        (1e9, 32),
        (1e9, 128),
    ]
    for row in found.rows:
        # With FC2 at 8 bits the inputs cost less, so the weights take over with fewer tokens.
        assert row["fc2_inputs_at_8"] < row["all_inputs_at_4"]
    assert found.as_text().count("N 1e+0") == 4


@pytest.mark.parametrize(
    "wrong", [(0, 1e9, 32), (1e8, -1, 32), (1e8, 1e9, 1), (math.nan, 1e9, 32), (1e8, math.inf, 32)]
)
def test_impossible_values_are_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(BitplanError, match="give a number of at least"):
        predict(*wrong, "w4a4")


def test_an_unknown_precision_names_those_there_are() -> None:
    with pytest.raises(BitplanError, match="w4a16"):
        predict(1e8, 1e9, 32, "w2a2")


def test_the_command_line_prints_the_forecast() -> None:
    asked = ["law", "predict", "--params", "594.5e6", "--tokens", "100e9"]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0
    assert "0.0573" in result.stdout
    bad = CliRunner().invoke(main, [*asked, "--group-size", "1"])
    assert bad.exit_code == EXIT_BAD_INPUT
    assert bad.stderr.count("\n") == 1
