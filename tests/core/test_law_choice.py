"""The law that forecasts a training is the one fitted nearest to it, and says why it was taken."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bitplan import law_choice
from bitplan.cli import EXIT_BAD_INPUT, main
from bitplan.errors import FitError
from bitplan.law import PAPER, Grid, Law, LawSet, read_laws, write_laws
from bitplan.law_choice import find_law, shipped

SMALL = replace(
    PAPER,
    source="12 trainings of ours",
    laws={name: replace(law, k=2 * law.k) for name, law in PAPER.laws.items()},
    grid=Grid(params=(1e6, 1e7), tokens=(2e6, 4e7), group_size=(32, 256)),
    intervals={"w4a4": {"k": (0.1, 0.2)}},
    provenance={"hardware": ["1 x GPU"]},
)
LAWS = {"paper": PAPER, "small": SMALL}
numbers = st.floats(1e3, 1e14)


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as if SMALL shipped with it."""
    write_laws(tmp_path / "laws" / "small.json", SMALL)
    monkeypatch.setattr(law_choice, "shipped", lambda: shipped(tmp_path / "laws"))
    return tmp_path / "laws" / "small.json"


def source(**values: float) -> str:
    return find_law(None, laws=LAWS, **values).source


def test_a_file_keeps_all_of_a_law(both: Path) -> None:
    assert shipped(both.parent) == LAWS
    assert read_laws(both) == SMALL
    assert "why" not in json.loads(both.read_text())


def test_without_further_laws_there_is_no_choice_and_no_reason(tmp_path: Path) -> None:
    alone = shipped(tmp_path / "absent")
    assert alone == {"paper": PAPER}
    assert find_law(None, laws=alone, params=1e6, tokens=1e7) == PAPER


def test_the_law_within_whose_ranges_a_training_lies_is_taken() -> None:
    found = find_law(None, laws=LAWS, params=3e6, tokens=1e7)
    assert found.source == SMALL.source
    assert found.why == "N and D lie within what the small law was fitted on"
    assert source(params=2e8, tokens=2e10) == PAPER.source
    assert source(params=3e6) == SMALL.source
    assert source(flops=6 * 3e6 * 1e7) == SMALL.source
    assert "N lies within" in find_law(None, laws=LAWS, params=[2e8, 3e8]).why


@given(numbers, numbers)
def test_outside_of_all_the_nearest_in_logarithms_is_taken(n: float, d: float) -> None:
    def distance(law: LawSet) -> float:
        squares = 0.0
        for value, (low, high) in ((n, law.grid.params), (d, law.grid.tokens)):
            inside = min(max(value, low), high)
            squares += math.log(value / inside) ** 2
        return squares

    found = find_law(None, laws=LAWS, params=n, tokens=d)
    nearest, other = (SMALL, PAPER) if found.source == SMALL.source else (PAPER, SMALL)
    assert distance(nearest) <= distance(other) + 1e-9
    assert ("outside, nearest to" in found.why) == (distance(nearest) > 0)


def test_ties_go_to_the_papers_and_say_so() -> None:
    wide = {**LAWS, "wide": replace(SMALL, source="wide", grid=PAPER.grid)}
    found = find_law(None, laws=wide, params=2e8, tokens=2e10)
    assert found.source == PAPER.source
    assert "the laws paper, wide were fitted on alike: the first" in found.why


def test_a_law_that_lacks_a_precision_is_passed_over() -> None:
    lacking = {**LAWS, "small": replace(SMALL, laws={"w4a4": SMALL.laws["w4a4"]})}
    found = find_law(None, laws=lacking, needs=["w4a16"], params=3e6, tokens=1e7)
    assert found.source == PAPER.source
    assert "small lacks a precision" in found.why
    assert find_law(None, laws=lacking, needs=["w4a4"], params=3e6).source == SMALL.source


def test_a_law_can_be_asked_for_by_name_or_file(both: Path) -> None:
    assert find_law("paper", laws=LAWS, params=3e6).source == PAPER.source
    assert find_law(str(both), laws=LAWS, params=2e8) == SMALL
    with pytest.raises(FitError, match="nor one of the laws that ship: paper, small"):
        find_law("other", laws=LAWS, params=2e8)


def test_commands_take_the_law_that_fits_and_say_which(both: Path) -> None:
    asked = ["law", "predict", "--params", "3e6", "--tokens", "1e7"]
    told = CliRunner().invoke(main, asked)
    assert "12 trainings of ours (N and D lie within what the small law" in told.stdout
    paper = CliRunner().invoke(main, [*asked, "--law", "paper"])
    assert "arXiv 2505.14302 (the paper law was asked for)" in paper.stdout
    bad = CliRunner().invoke(main, [*asked, "--law", "none"])
    assert bad.exit_code == EXIT_BAD_INPUT
    assert bad.stderr.count("\n") == 1
    for words in (
        ["budget", "--flops", str(6 * 3e6 * 1e7)],
        ["budget", "--bytes", "1.5e6", "--tokens", "1e7"],
        ["crossover", "--params", "3e6"],
    ):
        result = CliRunner().invoke(main, ["law", *words])
        assert result.exit_code == 0, result.output
        assert "12 trainings of ours" in result.stdout


def test_weights_that_never_catch_up_have_no_crossover() -> None:
    slow = replace(PAPER, laws={**PAPER.laws, "w4a16": Law(1.0, 0.3, 0.0, 0.5)})
    assert slow.crossover_tokens(1e8, 128, fc2_at_8=False) is None
    # Growing hardly faster, they would need more tokens than a float counts.
    near = replace(PAPER, laws={**PAPER.laws, "w4a16": Law(1e-6, 0.3, 0.0332, 0.5)})
    assert near.crossover_tokens(1e8, 128, fc2_at_8=False) is None


def test_the_law_that_ships_is_of_the_committed_trainings() -> None:
    laws = {name: law for name, law in shipped().items() if name != "paper"}
    assert laws
    for law in laws.values():
        assert law.provenance["tables"]
        for table, expected in law.provenance["tables"].items():
            content = (Path(__file__).parents[2] / table).read_bytes()
            assert hashlib.sha256(content).hexdigest() == expected
