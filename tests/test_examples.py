"""The examples run as a user would run them, and what they write is right."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from bitplan.tables import ERRORS, PROFILE

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, directory: Path) -> str:
    """Run an example that writes to directory/out; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), str(directory / "out")],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("record_training", ["int4-g32", "int8-token"]),
        ("trainer_callback", ["int4-g32"]),
        ("lightning_callback", ["int4-g32"]),
    ],
)
def test_example(name: str, formats: list[str], tmp_path: Path) -> None:
    if name == "lightning_callback":
        pytest.importorskip("lightning", reason="needs bitplan[lightning]")
    assert "stats.parquet" in run(name, tmp_path)
    stats = pl.read_parquet(tmp_path / "out" / "stats.parquet")
    errors = pl.read_parquet(tmp_path / "out" / "errors.parquet")
    assert dict(stats.schema) == PROFILE.schema
    assert dict(errors.schema) == ERRORS.schema
    assert stats["step"].unique().sort().to_list() == [5, 10, 15, 20]
    # 2 blocks of 7 linears and the head, each with an input; all of them and the embedding weights.
    by_operand = dict(stats.filter(step=20).group_by("operand").len().iter_rows())
    assert by_operand == {"input": 15, "weight": 16}
    inputs = stats.filter(operand="input")
    assert inputs["tokens"].unique().to_list() == [4 * 64]
    assert inputs.filter(pl.col("kurtosis").is_null()).is_empty()
    assert set(errors.filter(pl.col("site").str.ends_with(":input"))["format"]) == set(formats)
    assert errors["relative_error"].is_between(0, 1).all()
    if name == "record_training":
        drift = stats.filter(pl.col("site").str.ends_with("down_proj:weight")).sort("step")
        first = drift.filter(step=5)["drift"].to_list()
        last = drift.filter(step=20)["drift"].to_list()
        assert all(0 < a < b for a, b in zip(first, last, strict=True))


def test_dashboards(tmp_path: Path) -> None:
    printed = run("dashboards", tmp_path)
    written = {"tensorboard": "*tfevents*", "wandb": "*.wandb"}
    for package, pattern in written.items():
        installed = importlib.util.find_spec(package) is not None
        assert bool(list((tmp_path / "out").rglob(pattern))) == installed
        assert (f"bitplan[{package}]" in printed) != installed
