"""`plan --diff`: which formats changed, where, and what that is predicted to cost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bitplan.cli import main
from bitplan.errors import PlanError, RunError
from bitplan.options import PlanOptions
from bitplan.planner.diff import diff_plans
from bitplan.planner.stage import make_plan


@pytest.fixture
def runs(tables: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """Return uniform 4 bits, and the same with the FC2 inputs of blocks 0 and 2 at 8."""
    a, b = (tables(3).write(tmp_path / name) for name in "ab")
    make_plan(a, PlanOptions(rule="uniform"))
    pins = tuple(f"model.layers.{block}.mlp.down_proj:input=int8-g128" for block in (0, 2))
    make_plan(b, PlanOptions(rule="uniform", pins=pins))
    return a, b


def test_it_names_what_changed(runs: tuple[Path, Path]) -> None:
    found = diff_plans(*runs)
    value = found.as_json()
    assert [(c["site"], c["format"]) for c in value["changed"]] == [
        (f"model.layers.{b}.mlp.down_proj:input", ["int4-g128", "int8-g128"]) for b in (0, 2)
    ]
    plans = [json.loads((run / "plan.json").read_text()) for run in runs]
    for name, each in value["predicted"].items():
        x, y = (plan["predicted"][name] for plan in plans)
        assert (each["a"], each["b"]) == (x, y)
        assert each["change"] == (None if None in (x, y) else pytest.approx(y - x))
    assert value["predicted"]["delta_loss"]["change"] < 0
    text = " ".join(found.as_text().split())
    assert "2 of 45 sites (42 planned) changed" in text
    assert "fc2:input int4-g128 -> int8-g128 2 sites, blocks 0, 2" in text
    assert "pin model.layers.0.mlp.down_proj:input=int8-g128" in text
    assert value["notes"] == []
    back = diff_plans(*reversed(runs)).as_json()
    assert back["changed"][0]["format"] == ["int8-g128", "int4-g128"]
    same = diff_plans(runs[0], runs[0])
    assert same.changed == []
    assert all(each["change"] in (0, None) for each in same.as_json()["predicted"].values())


def test_a_run_and_its_plan_file_are_the_same(runs: tuple[Path, Path]) -> None:
    a, b = runs
    files = diff_plans(a / "plan.json", b / "plan.json").as_json()
    assert files["changed"] == diff_plans(a, b).as_json()["changed"]


def test_other_scales_and_other_weights_are_noted(runs: tuple[Path, Path]) -> None:
    a, b = runs
    make_plan(b, PlanOptions(rule="uniform", tokens=50e9, params=297e6))
    assert "two scales" in diff_plans(a, b).as_text()
    path = b / "plan.json"
    value = json.loads(path.read_text())
    value["provenance"]["model"]["content_hash"] = "f" * 16
    path.write_text(json.dumps(value))
    assert "same sites and other weights" in diff_plans(a, path).as_text()


def test_plans_of_different_checkpoints_are_refused(
    runs: tuple[Path, Path], tables: Callable[..., Any], tmp_path: Path
) -> None:
    other = tables(4).write(tmp_path / "other")
    make_plan(other, PlanOptions())
    with pytest.raises(PlanError, match=r"14 sites are in one alone \(.*a lacks model\.layers\.3"):
        diff_plans(runs[0], other)
    with pytest.raises(RunError, match="is missing"):
        diff_plans(runs[0], tmp_path / "none.json")
    with pytest.raises(RunError, match="bitplan plan"):
        diff_plans(runs[0], tables(1).write(tmp_path / "unplanned"))


def test_the_command(runs: tuple[Path, Path]) -> None:
    a, b = map(str, runs)
    before = {path: path.read_bytes() for run in runs for path in run.iterdir()}
    done = CliRunner().invoke(main, ["plan", "--diff", a, b, "--json"])
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)["changed"]) == 2
    assert {path: path.read_bytes() for run in runs for path in run.iterdir()} == before
    for arguments, said in (
        (["plan", a, "--diff", a, b], "--diff goes without RUN"),
        (["plan"], "RUN is missing"),
        (["plan", "--diff", a], "requires 2 arguments"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert said in done.stderr
