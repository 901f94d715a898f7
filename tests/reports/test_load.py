import json
from pathlib import Path

import polars as pl
import pytest

from bitplan import tables
from bitplan.errors import RunError
from bitplan.reports.load import load_run, read_table

from .conftest import ARMS, MakeRun, edit_json


def test_a_whole_run_is_read(make_run: MakeRun) -> None:
    run = load_run(make_run(seeds=2, steps=8))
    assert {(arm.name, arm.seed) for arm in run.arms} == {(a, s) for a in ARMS for s in (0, 1)}
    assert run.profile is not None
    assert run.profile.columns == [column.name for column in tables.PROFILE.columns]
    assert run.verdict is not None
    assert run.verdict["verdict"] == "converged"
    assert run.model_name == "tiny-llama"


def test_what_no_stage_made_is_none(make_run: MakeRun) -> None:
    run = load_run(make_run(stages=("profile",)))
    assert (run.plan, run.frontier, run.verdict, run.arms) == (None, None, None, ())


def test_an_arm_under_way_is_read(make_run: MakeRun) -> None:
    path = make_run(seeds=1, steps=8)
    (path / "arms/w4a4/seed-0/record.json").unlink()
    (path / "arms/w4a4/seed-0/stats.parquet").unlink()
    (path / "arms/notes").mkdir()
    arm = next(arm for arm in load_run(path).arms if arm.name == "w4a4")
    assert arm.record == {}
    assert arm.stats is None
    assert arm.metrics is not None


def test_a_promised_file_that_is_gone_is_an_error(make_run: MakeRun) -> None:
    path = make_run(stages=("profile", "plan"))
    (path / "errors.parquet").unlink()
    with pytest.raises(RunError, match=r"lacks errors\.parquet, which its profile wrote"):
        load_run(path)


def test_a_damaged_table_is_an_error(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",))
    whole = (path / "profile.parquet").read_bytes()
    (path / "profile.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"profile\.parquet cannot be read"):
        load_run(path)


def test_a_table_without_a_needed_column_is_an_error(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",))
    pl.read_parquet(path / "profile.parquet").drop("kurtosis").write_parquet(
        path / "profile.parquet"
    )
    with pytest.raises(RunError, match="lacks the column kurtosis"):
        load_run(path)


def test_a_column_of_another_type_is_an_error(tmp_path: Path) -> None:
    frame = pl.DataFrame({"step": ["one"], "tokens": [1], "loss": [1.0]})
    frame.write_parquet(tmp_path / "metrics.parquet")
    with pytest.raises(RunError, match="column of another type"):
        read_table(tmp_path / "metrics.parquet", tables.METRICS)


def test_columns_may_be_added_and_optional_ones_be_absent(tmp_path: Path) -> None:
    frame = pl.DataFrame({"step": [1], "tokens": [2], "loss": [float("nan")], "new": [0]})
    frame.write_parquet(tmp_path / "metrics.parquet")
    read = read_table(tmp_path / "metrics.parquet", tables.METRICS)
    assert read is not None
    assert read.columns == [column.name for column in tables.METRICS.columns]
    assert read["loss"].to_list() == [None]  # NaN never reaches a mean or a chart


def test_a_document_that_is_no_object_is_an_error(make_run: MakeRun) -> None:
    path = make_run(stages=("profile", "plan"))
    (path / "plan.json").write_text(json.dumps([1]))
    with pytest.raises(RunError, match="holds no JSON object"):
        load_run(path)


def test_another_schema_version_is_an_error(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",))
    edit_json(path / "run.json", schema=99)
    with pytest.raises(RunError, match="schema version 99"):
        load_run(path)


def test_no_run_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run directory"):
        load_run(tmp_path)
