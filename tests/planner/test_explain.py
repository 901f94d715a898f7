"""`plan --explain`: every fact of a site is that of the tables, counted again by loops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from bitplan.cli import main
from bitplan.errors import PlanError, RunError
from bitplan.options import PlanOptions
from bitplan.planner.explain import explain_sites
from bitplan.planner.stage import make_plan

SITE = "model.layers.1.mlp.down_proj:input"


@pytest.fixture
def run(tables: Callable[..., Any], tmp_path: Path) -> Path:
    path = tables(3).write(tmp_path / "run")
    make_plan(path, PlanOptions(input_bits=5.0, pins=("model.layers.2.mlp.down_proj=int8-g128",)))
    return path


def story(run: Path, site: str) -> dict[str, Any]:
    (found,) = explain_sites(run, site).as_json()["sites"]
    return dict(found)


def test_it_tells_what_the_tables_hold(run: Path) -> None:
    found = story(run, SITE)
    plan = json.loads((run / "plan.json").read_text())
    assert found["choice"] == plan["sites"][SITE]
    rows = pl.read_parquet(run / "sensitivity.parquet").filter(site=SITE).to_dicts()
    assert [f["format"] for f in found["by_format"]] == ["int4-g128", "int8-g128"]
    for mine, row in zip(found["by_format"], rows, strict=True):
        assert mine["delta_loss"] == row["delta_loss"]
        assert mine["low"] == pytest.approx(row["delta_loss"] - 1.96 * row["stderr"])
        assert mine["high"] == pytest.approx(row["delta_loss"] + 1.96 * row["stderr"])
    profile = pl.read_parquet(run / "profile.parquet")
    assert found["statistics"]["kurtosis"] == profile.filter(site=SITE)["kurtosis"][0]
    inputs = [s for s in profile["site"] if s.endswith(":input") and "lm_head" not in s]
    assert found["peers"] == len(inputs)
    loss = {
        s: v
        for s, f, v in pl.read_parquet(run / "sensitivity.parquet")
        .select("site", "format", "delta_loss")
        .iter_rows()
        if f == "int4-g128" and s in inputs
    }
    assert found["rank"] == sorted(loss.values(), reverse=True).index(loss[SITE]) + 1
    kurtosis = dict(profile.filter(pl.col("site").is_in(inputs)).select("site", "kurtosis").rows())
    assert (
        found["kurtosis_rank"] == sorted(kurtosis.values(), reverse=True).index(kurtosis[SITE]) + 1
    )


def test_the_text_says_why_and_what_else_would_cost(run: Path) -> None:
    text = " ".join(explain_sites(run, SITE).as_text().split())
    choice = make_plan(
        run, PlanOptions(input_bits=5.0, pins=("model.layers.2.mlp.down_proj=int8-g128",))
    ).plan.sites
    mine = next(c for c in choice if c.site == SITE)
    assert mine.next_best is not None
    assert f"{SITE} (fc2, block 1, 64 x 160)" in text
    assert mine.reason in text
    assert "chosen by the planner" in text
    assert f"next best {mine.next_best.format}: {mine.next_best.delta_loss:+.2g} nats" in text
    pinned = explain_sites(run, "model.layers.2.mlp.down_proj:input").as_text()
    assert "forced by a pin" in pinned
    outside = explain_sites(run, "lm_head:input").as_text()
    assert "forced by its role, which is outside the plan" in outside


def test_kurtosis_that_misleads_is_told(tables: Callable[..., Any], tmp_path: Path) -> None:
    made = tables(4)
    here = pl.col("site") == SITE
    made.profile = made.profile.with_columns(kurtosis=pl.when(here).then(5000.0).otherwise(4.0))
    made.sensitivity = made.sensitivity.with_columns(
        delta_loss=pl.when(here).then(1e-9).otherwise("delta_loss")
    )
    run = made.write(tmp_path / "run")
    make_plan(run, PlanOptions())
    assert "misleads here" in explain_sites(run, SITE).as_text()
    found = story(run, SITE)
    assert (found["kurtosis_rank"], found["rank"]) == (1, found["peers"])
    assert "misleads" not in explain_sites(run, "model.layers.0.mlp.down_proj:input").as_text()


def test_without_sensitivity_ranks_are_by_error(tables: Callable[..., Any], tmp_path: Path) -> None:
    made = tables(3)
    made.sensitivity = None
    run = made.write(tmp_path / "run")
    make_plan(run, PlanOptions())
    text = " ".join(explain_sites(run, SITE).as_text().split())
    assert "planned inputs by error at int4-g128" in text
    assert "of weighted error" in text
    assert "nats" not in text


def test_a_glob_tells_many_and_counts_the_rest(run: Path) -> None:
    assert len(explain_sites(run, "fc2").stories) == 6
    every = explain_sites(run, "*")
    assert every.as_text().endswith(f"and {len(every.stories) - 20} more sites: --json has all")
    assert len(every.as_json()["sites"]) == len(every.stories)
    assert max(len(line) for line in every.as_text().splitlines()) <= 100


def test_nothing_is_written_and_bad_input_is_told(
    run: Path, tables: Callable[..., Any], tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = CliRunner().invoke(main, ["plan", str(run), "--explain", SITE, "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["sites"][0]["site"] == SITE
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    with pytest.raises(PlanError, match=r"--explain 'fc4' matches no site: did you mean fc[12]"):
        explain_sites(run, "fc4")
    done = CliRunner().invoke(main, ["plan", str(run), "--explain", SITE, "--input-bits", "5"])
    assert (done.exit_code, "--explain goes without --input-bits" in done.stderr) == (2, True)
    tables(3, seed=1).write(run)
    with pytest.raises(PlanError, match=r"profile\.parquet is not what plan\.json was made from"):
        explain_sites(run, SITE)
    with pytest.raises(RunError, match="bitplan plan"):
        explain_sites(tables(1).write(tmp_path / "unplanned"), SITE)
