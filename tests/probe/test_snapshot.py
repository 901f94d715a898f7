import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from bitplan.cli import main
from bitplan.errors import RunError
from bitplan.probe.snapshot import load_snapshot
from bitplan.rundir import RunDir
from bitplan.tables import ERRORS, OUTLIERS, PROFILE

from .test_compare import rows

ERROR = {"step": 0, "format": "int4-g128", "relative_error": 0.01}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A profiled run directory with one training, recorded at steps 0, 10 and 20."""
    path = tmp_path / "run"
    directory = RunDir.create(path)
    tables: dict[str, Any] = {
        PROFILE.file: PROFILE.frame(rows()),
        ERRORS.file: ERRORS.frame(ERROR | {"site": row["site"]} for row in rows()),
        OUTLIERS.file: OUTLIERS.frame([]),
    }
    with directory.lock():
        directory.commit("profile", {}, tables, data={"content_hash": "abc"}, seed=0)
        steps = [row for step in (0, 10, 20) for row in rows(step=step, kurtosis=5.0 + step)]
        directory.write_table("arms/w4a4/seed-0/stats.parquet", PROFILE.frame(steps))
    return path


def test_a_run_is_its_profile(run: Path) -> None:
    found = load_snapshot(str(run))
    assert found.name == str(run)
    assert found.profile.height == 12
    assert found.errors is not None
    assert found.errors.height == 12
    assert found.outliers is not None
    assert found.text == json.dumps([{"content_hash": "abc"}, 0])


@pytest.mark.parametrize(("suffix", "step"), [("", 20), ("@10", 10), ("@0", 0)])
@pytest.mark.parametrize("file", ["", "/stats.parquet"])
def test_a_training_is_one_of_its_steps(run: Path, file: str, suffix: str, step: int) -> None:
    place = f"{run}/arms/w4a4/seed-0{file}"
    found = load_snapshot(place + suffix)
    assert found.name == f"{place}@{step}"
    assert set(found.profile["step"]) == {step}
    assert set(found.profile["kurtosis"]) == {5.0 + step}
    assert found.errors is found.outliers is found.text is None


def test_a_name_with_an_at_sign_is_a_name(run: Path) -> None:
    other = run.rename(run.with_name("run@3"))
    assert load_snapshot(str(other)).profile.height == 12
    assert load_snapshot(f"{other}/arms/w4a4/seed-0@10").profile["step"][0] == 10


def test_columns_of_an_older_version_are_null(run: Path) -> None:
    file = run / PROFILE.file
    pl.read_parquet(file).drop("top_channel_stability", "drift").write_parquet(file)
    found = load_snapshot(str(run))
    assert dict(found.profile.schema) == PROFILE.schema
    assert found.text is None  # and without provenance no text is known


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{run}@7", r"has no step 7: it has 0; steps of a training are in .*/arms/w4a4/seed-0"),
        ("{run}/arms/w4a4/seed-0@7", "has no step 7: it has 0, 10, 20"),
        ("{run}/nothing", "no such file or directory"),
        ("{run}/arms", "has neither profile.parquet nor stats.parquet: it is no run"),
        ("{run}/errors.parquet", "holds no statistics of a model: it lacks 'module'"),
        ("{run}/run.json", "cannot be read"),
    ],
)
def test_what_is_not_there_is_said(run: Path, spec: str, says: str) -> None:
    with pytest.raises(RunError, match=says):
        load_snapshot(spec.format(run=run))


def test_a_run_that_is_not_profiled_yet(tmp_path: Path) -> None:
    directory = RunDir.create(tmp_path / "new")
    with directory.lock():
        directory.finish("nothing", {}, [])
    with pytest.raises(RunError, match="its profile is not made yet"):
        load_snapshot(str(tmp_path / "new"))


def test_a_file_without_rows(tmp_path: Path) -> None:
    PROFILE.frame([]).write_parquet(tmp_path / "stats.parquet")
    with pytest.raises(RunError, match="it has no rows"):
        load_snapshot(str(tmp_path))


def test_two_steps_on_the_command_line(run: Path) -> None:
    arm = f"{run}/arms/w4a4/seed-0"
    result = CliRunner().invoke(main, ["profile", "--compare", f"{arm}@0", f"{arm}@20"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"A: {arm}@0\nB: {arm}@20\n")
    assert "x5" in result.stdout
    as_json = CliRunner().invoke(main, ["profile", "--json", "--compare", str(run), f"{arm}@0"])
    assert json.loads(as_json.stdout)["unchanged"] == 12
