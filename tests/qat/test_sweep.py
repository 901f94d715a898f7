"""A sweep trains each cell of its grid once, goes on after anything, and its table is the law's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from bitplan.cli import EXIT_BAD_INPUT, EXIT_NO, main
from bitplan.errors import BitplanError, DataError
from bitplan.options import SweepOptions
from bitplan.qat.law_runs import read_sweep, read_trainings
from bitplan.qat.sweep import run_sweep
from bitplan.qat.sweep_ratios import read_ratios
from bitplan.qat.sweep_tokens import Tokens
from bitplan.qat.verdict import Interval, decide
from bitplan.tables import RATIOS, SWEEP

GRID = """
tokens = [256]
group_sizes = [16]
precisions = ["bf16", "w4a4"]
eval_tokens = 256
data = ["{text}"]
[recipe]
batch_size = 2
seq_len = 32
lr = 2e-3
[[models]]
layers = 1
hidden = 16
ffn = 32
heads = 1
"""
CPU = SweepOptions(device="cpu")


@pytest.fixture
def grid(tmp_path: Path, text: Path) -> Callable[..., Path]:
    """Write a grid with lines of it replaced."""

    def write(*changes: tuple[str, str], extra: str = "") -> Path:
        content = GRID.format(text=text)
        for old, new in changes:
            assert old in content
            content = content.replace(old, new)
        path = tmp_path / "grid.toml"
        path.write_text(content + extra)
        return path

    return write


def losses(sweep: Path) -> dict[str, float]:
    return dict(read_sweep(sweep).select("config_hash", "loss").iter_rows())


def test_every_cell_is_trained_once(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    found = run_sweep(grid(), out, CPU)
    assert (found.cells, found.left, dict(found.failed)) == (2, 2, {})
    first = losses(out)
    records = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/arms/*/*/record.json")}
    assert len(records) == 2
    # More cells: those that are there are not trained again.
    more = grid(("[16]", '[16, "row"]'), ('"w4a4"]', '"w4a4", "w16a4-fc2-8"]'))
    assert run_sweep(more, out, CPU).left == 3
    assert {p: p.stat().st_mtime_ns for p in records} == records
    table = pl.read_parquet(out / SWEEP.file)
    assert table.height == 5
    assert first.items() <= losses(out).items()
    assert set(table["precision"]) == {"bf16", "w4a4", "w16a4+fc2"}
    # Rows are 16 long but those of FC2, which has 512 of the 2,560 elements: 2^(4 + 1/5).
    assert set(table["group_size"]) == {None, 16, 18}
    assert table["params"].n_unique() == 1


def test_the_table_alone_is_enough_to_go_on(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    run_sweep(grid(), out, CPU)
    before = losses(out)
    shutil.rmtree(out / "runs")
    assert run_sweep(grid(), out, CPU).left == 0
    assert losses(out) == before
    assert run_sweep(grid(("[256]", "[256, 512]")), out, CPU).left == 2
    assert read_trainings([out])[0].height == 4


def test_delta_and_its_error_are_those_of_the_heldout_sequences(
    grid: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    run_sweep(grid(), out, CPU)
    (run,) = (out / "runs").iterdir()

    def read(arm: str) -> Any:
        return pl.read_parquet(run / "arms" / arm / "seed-0" / "heldout.parquet")["loss"].to_numpy()

    gap = read("w4a4-g16") - read("bf16")
    row = read_sweep(out).filter(precision="w4a4").row(0, named=True)
    assert row["delta"] == pytest.approx(gap.mean())
    assert row["stderr"] == pytest.approx(np.std(gap, ddof=1) / np.sqrt(len(gap)))
    assert row["group_size"] == 16


def test_r_is_that_of_the_heldout_losses(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    precisions = '"w4a16", "w16a4", "w16a4-fc2-8"]\nseeds = 2'
    run_sweep(grid(('"w4a4"]', precisions), ("[16]", '[16, "row"]')), out, CPU)
    (run,) = (out / "runs").iterdir()

    def gap(arm: str) -> float:
        means = [
            pl.read_parquet(path)["loss"].mean()
            for name in (arm, "bf16")
            for path in sorted(run.glob(f"arms/{name}/*/heldout.parquet"))
        ]
        assert len(means) == 4
        return means[0] + means[1] - means[2] - means[3]  # type: ignore[operator]

    found = pl.read_parquet(out / RATIOS.file)
    assert found.height == 4
    assert found["seeds"].to_list() == [2] * 4
    for row in found.iter_rows(named=True):
        group = "g16" if row["group_size"] == 16 else "row"
        inputs = "w16a4-fc2-8" if row["fc2_at_8"] else "w16a4"
        expected = gap(f"{inputs}-{group}") / gap(f"w4a16-{group}")
        assert row["R"] == pytest.approx(expected)
        assert row["verdict"] == decide(Interval(row["R"], row["low"], row["high"]))
    for left in (run / "arms" / "w4a16-g16" / "seed-1", run / "arms" / "bf16", out / "runs"):
        shutil.rmtree(left)  # what is not here any more stays as it was read
        assert read_ratios(out, read_sweep(out)).equals(found)


@pytest.mark.slow
def test_side_by_side_gives_the_same_losses(grid: Callable[..., Path], tmp_path: Path) -> None:
    path = grid(("eval_tokens", "seeds = 2\neval_tokens"))
    run_sweep(path, tmp_path / "one", CPU)
    run_sweep(path, tmp_path / "two", SweepOptions(device="cpu", workers=2))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, rel=1e-6)
    assert len(set(one.values())) == 4  # seeds draw other weights and other batches


def test_a_cell_that_fails_lets_the_others_go_on(grid: Callable[..., Path], tmp_path: Path) -> None:
    path = grid(extra="[[models]]\nlayers = 1\nhidden = 32\nffn = 32\nheads = 1\nlr = 1e30\n")
    arguments = ["sweep", str(path), "-o", str(tmp_path / "sweep"), "--device", "cpu"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == EXIT_NO, result.output
    assert "2 trainings done" in result.output
    assert "2 failed" in result.output
    assert "failed: l1-h32" in result.output
    assert set(read_sweep(tmp_path / "sweep")["precision"]) == {"bf16", "w4a4"}
    assert read_sweep(tmp_path / "sweep").height == 2


def test_a_dry_run_trains_nothing(grid: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["sweep", str(grid()), "-o", str(tmp_path / "sweep"), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["cells"], found["left"], found["tokens_left"]) == (2, 2, 2 * 256)
    assert not (tmp_path / "sweep" / "runs").exists()
    run_sweep(grid(), tmp_path / "sweep", CPU)
    again = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert "0 of 2 trainings to do" in again.output


def test_tokens_of_another_sweep_serve(grid: Callable[..., Path], tmp_path: Path) -> None:
    run_sweep(grid(), tmp_path / "one", CPU)
    data = next(line for line in grid().read_text().splitlines() if line.startswith("data"))
    run_sweep(grid((data, 'tokenized = "one/tokens"')), tmp_path / "two", CPU)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    with pytest.raises(BitplanError, match="made for eval_tokens 256"):
        run_sweep(
            grid((data, 'tokenized = "one/tokens"'), ("eval_tokens = 256", "eval_tokens = 512")),
            tmp_path / "three",
            CPU,
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"w4a4"', '"w3a4"'), "no precision 'w3a4'"),
        (("[16]", "[24]"), "group size 24 does not divide the 16 inputs"),
        (("tokens = [256]", "tokens = [63]"), "less than one batch of 2 x 32 = 64"),
        (("tokens = [256]", "tokens = [1e9]"), r"up to 1,000,000,000 tokens, and .* repeat = true"),
        (('"bf16", ', ""), "no bf16 to be compared with"),
        (("layers = 1", "depth = 1"), "a model has no 'depth'"),
        (("layers = 1\n", ""), "a model lacks layers"),
        (("lr = 2e-3", "lr = 0"), "above 0"),
        (("seq_len = 32", ""), "recipe lacks seq_len"),
        (("lr = 2e-3", 'lr = 2e-3\nschedule = "steps"'), "'steps': it takes cosine, wsd"),
        (("tokens = [256]", "tokens = []"), "tokens is"),
        (("heads = 1", "heads = 3"), "multiple of the next"),
        (("tokens = [256]", "tokens = ["), "cannot be read"),
        (("eval_tokens = 256", "eval_tokens = 2.5"), "whole numbers"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_trained(
    grid: Callable[..., Path], tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    out = tmp_path / "sweep"
    with pytest.raises(BitplanError, match=said):
        run_sweep(grid(change), out, CPU)
    assert not (out / "runs").exists()
    if "tokens" not in change[0]:  # all but how much text there is comes before it is tokenized
        assert not (out / "tokens").exists()
    result = CliRunner().invoke(main, ["sweep", str(grid(change)), "-o", str(out)])
    assert result.exit_code == EXIT_BAD_INPUT


def test_more_than_an_epoch_needs_repeat(grid: Callable[..., Path], tmp_path: Path) -> None:
    run_sweep(grid(), tmp_path / "sweep", CPU)
    facts = json.loads((tmp_path / "sweep" / "tokens" / "tokens.json").read_text())
    tokens = Tokens(**facts, path=str(tmp_path / "sweep" / "tokens"))
    windows = tokens.train_tokens // tokens.seq_len
    twice = tokens.train_ids(2 * windows, seed=3)
    first, second = twice[:windows], twice[windows:]
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    assert not first.equal(second)
    assert tokens.train_ids(5, seed=3).equal(first[:5])  # a longer D begins with the shorter
    assert not tokens.train_ids(5, seed=4).equal(first[:5])


def test_parts_are_one_grid(grid: Callable[..., Path], tmp_path: Path) -> None:
    extra = '[[parts]]\n[[parts]]\nseeds = [5]\nrecipe = {schedule = "wsd"}\n'
    out = tmp_path / "sweep"
    assert run_sweep(grid(extra=extra), out, CPU).cells == 4
    with pytest.raises(BitplanError, match="different schedules"):
        read_trainings([out])
    assert read_trainings([out], force=True)[0]["schedule"].to_list().count("wsd") == 2


def test_one_cell_under_two_recipes_is_not_pooled(
    grid: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    run_sweep(grid(extra="[[parts]]\n[[parts]]\nrecipe = {lr = 1e-3}\n"), out, CPU)
    with pytest.raises(DataError, match=r"2 trainings are there twice.*bf16"):
        read_trainings([out])
    assert read_trainings([out], force=True)[0].height == 4
