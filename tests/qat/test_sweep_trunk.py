"""A branched grid: arms go on from points of a trunk, as training by hand from its weights does."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from bitplan.cli import main
from bitplan.errors import BitplanError, DataError
from bitplan.formats import parse_format
from bitplan.options import SweepOptions
from bitplan.probe.modules import find_linears
from bitplan.qat import training
from bitplan.qat.job import Job
from bitplan.qat.law_runs import deltas, read_sweep, read_trainings
from bitplan.qat.recipe import Recipe, make_optimizer, sequence_losses
from bitplan.qat.start import Start
from bitplan.qat.sweep import _model, _task, run_sweep
from bitplan.qat.sweep_grid import PRECISIONS, parse_grid
from bitplan.qat.sweep_tokens import Read, Tokens, _order
from bitplan.qat.train import make_accelerator, train_arm
from bitplan.rundir import RunDir, read_json
from bitplan.sites import PLANNED_ROLES
from bitplan.tables import RATIOS

from .test_sweep import CPU, grid, losses

__all__ = ["grid"]  # the fixture

STEP = 2 * 32
BRANCHED = """
[[parts]]
trunk_tokens = [384, 640]
trunk_warmup_steps = 3
tokens = [256]
"""
STUDY = Path(__file__).parents[2] / "benchmarks" / "study" / "sweep"


def points(sweep: Path) -> dict[str, Path]:
    return {path.stem: path for path in sweep.glob("trunks/*/*.safetensors")}


def tokens_of(sweep: Path) -> Tokens:
    place = sweep / "tokens"
    return Tokens(**read_json(place / "tokens.json"), path=str(place))


def test_a_point_is_a_plain_training_at_a_constant_rate(
    grid: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    run_sweep(grid(extra=BRANCHED), out, CPU)
    found = points(out)
    assert sorted(found) == ["d384", "d640"]
    place = found["d384"].parent
    model: Any = Start(source=str(place), identity="", is_checkpoint=False).model(0)
    model.config.use_cache = False
    ids = tokens_of(out).train_ids(20, 0)
    optimizer = make_optimizer(model, Recipe(steps=1, batch_size=2, seq_len=32, lr=2e-3))
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 3)
        sequence_losses(model.train(), ids[2 * step : 2 * step + 2]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (name := f"d{(step + 1) * STEP}") in found:
            for key, value in load_file(found[name]).items():
                torch.testing.assert_close(value, model.state_dict()[key])


def test_an_arm_is_a_training_from_the_weights_of_its_point(
    grid: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    run_sweep(grid(extra=BRANCHED), out, CPU)
    table = read_sweep(out)
    assert table["trunk_tokens"].to_list() == [384, 384, 640, 640]
    assert table["tokens"].to_list() == [640, 640, 896, 896]
    (run,) = out.glob("runs/*-t640-d896-*")
    model: Any = Start(source=str(run), identity="", is_checkpoint=False).model(7)
    model.load_state_dict(load_file(points(out)["d640"]))
    tokens = tokens_of(out)
    whole = tokens.train_ids(28, 0)
    formats = {
        item.linear.site(operand): parse_format("int4-g16")
        for item in find_linears(model)
        if item.linear.role in PLANNED_ROLES
        for operand in ("weight", "input")
    }
    for arm, of_arm in (("bf16", {}), ("w4a4", formats)):
        job = Job(
            arm=arm,
            seed=0,
            formats=of_arm,
            quantizers={},
            recipe=Recipe(steps=4, batch_size=2, seq_len=32, lr=2e-3),
            train=whole[20:],  # of the trunk's own seed: the very tokens that follow
            heldout=tokens.heldout_ids(),
        )
        by_hand = RunDir.create(tmp_path / arm)
        record = train_arm(by_hand, model, job, make_accelerator(torch.device("cpu")))
        row = table.filter(trunk_tokens=640, precision=arm).row(0, named=True)
        assert row["loss"] == pytest.approx(record["loss"]["heldout"], rel=1e-6)
    delta = dict(deltas(table).select("tokens", "delta").iter_rows())
    for row in table.filter(precision="w4a4").iter_rows(named=True):
        assert delta[row["tokens"]] == pytest.approx(row["delta"])


def test_a_point_does_not_depend_on_the_others(grid: Callable[..., Path], tmp_path: Path) -> None:
    one, grown = tmp_path / "one", tmp_path / "grown"
    run_sweep(grid(extra=BRANCHED.replace("384, ", "")), one, CPU)
    run_sweep(grid(extra=BRANCHED.replace(", 640", "")), grown, CPU)
    before = points(grown)["d384"].stat().st_mtime_ns
    assert run_sweep(grid(extra=BRANCHED), grown, CPU).left == 2
    assert points(grown)["d384"].stat().st_mtime_ns == before
    assert points(one)["d640"].read_bytes() == points(grown)["d640"].read_bytes()
    assert losses(one).items() <= losses(grown).items()
    # An earlier point, for which the state is too late.
    earlier = BRANCHED.replace("384", "320")
    run_sweep(grid(extra=earlier), grown, CPU)
    fresh = tmp_path / "fresh"
    run_sweep(grid(extra=earlier), fresh, CPU)
    assert points(grown)["d320"].read_bytes() == points(fresh)["d320"].read_bytes()


def test_seeds_share_the_trunk_and_differ_in_their_data(
    grid: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    extra = (
        BRANCHED.replace("384, ", "") + 'seeds = [0, 5]\nprecisions = ["bf16", "w4a16", "w16a4"]'
    )
    run_sweep(grid(extra=extra), out, CPU)
    assert len(points(out)) == 1
    table = read_sweep(out)
    assert table.height == 6
    assert table["trunk"].n_unique() == 1
    assert table.filter(precision="bf16")["loss"].n_unique() == 2
    ratios = pl.read_parquet(out / RATIOS.file)
    assert ratios.select("trunk_tokens", "seeds").rows() == [(640, 2)]


def test_an_arm_reads_what_its_trunk_has_not(tmp_path: Path) -> None:
    ids = np.arange(40 * 8, dtype=np.uint16)
    np.save(tmp_path / "train.npy", ids)
    facts = dict.fromkeys(("source", "text", "tokenizer", "train", "heldout"), "")
    tokens = Tokens(
        path=str(tmp_path), vocabulary=1, eval_tokens=1, seq_len=8, train_tokens=320, **facts
    )

    def windows(*asked: Any) -> list[int]:
        return [row[0] // 8 for row in tokens.train_ids(*asked).tolist()]

    trunk = windows(15, 0)
    for seed in (0, 3):
        arm = windows(25, seed, Read(15, 0))
        assert sorted(trunk + arm) == list(range(40))  # one epoch in total
        assert [w for w in windows(40, seed) if w not in trunk] == arm
    assert windows(25, 0, Read(15, 0)) == windows(40, 0)[15:]
    # More than an epoch: what the trunk has read of the second, and then the third.
    second, third = _order(40, 0, 1), _order(40, 3, 2)
    arm = windows(60, 3, Read(55, 0))
    assert sorted(arm[:25]) == sorted(second[15:])
    assert arm[25:] == third[:35].tolist()
    assert (
        len({tokens.order_hash(5, 0, r) for r in (None, Read(5, 0), Read(6, 0), Read(5, 1))}) == 4
    )


def test_a_trunk_trained_again_has_all_its_arms_trained_again(
    grid: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    path = grid(extra=BRANCHED)
    run_sweep(path, out, CPU)
    before = losses(out)
    shutil.rmtree(out / "trunks")
    assert run_sweep(path, out, CPU).left == 0  # nothing asks for the trunk
    assert not points(out)
    more = grid(("[16]", '[16, "row"]'), extra=BRANCHED)
    found = run_sweep(more, out, CPU)
    assert (found.cells, found.left, len(found.trunks)) == (6, 6, 2)
    assert before.items() <= losses(out).items()
    # Other weights, as another machine's rounding gives: what began from them does not pair.
    weights = points(out)["d640"]
    save_file({k: v * 1.01 for k, v in load_file(weights).items()}, weights)
    assert run_sweep(more, out, CPU).left == 3
    table = read_sweep(out).filter(trunk_tokens=640)
    assert table["trunk"].n_unique() == 1
    assert not set(table["loss"]) & set(before.values())
    mixed = table.with_columns(
        trunk=pl.when(precision="bf16").then(pl.lit("other")).otherwise("trunk")
    )
    assert deltas(mixed)["delta"].is_null().all()


def test_a_killed_trunk_goes_on(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_arm, "__kwdefaults__", {"save_every_s": 0.0, "pause_at": None})
    whole, out = tmp_path / "whole", tmp_path / "killed"
    path = grid(extra=BRANCHED)
    run_sweep(path, whole, CPU)
    take = training.Training.take_step
    taken: list[int] = []

    def die(self: Any, step: int) -> None:
        if step == 7 and self.job.arm == "trunk" and 7 not in taken:
            taken.append(step)
            raise KeyboardInterrupt
        taken.append(step)
        take(self, step)

    monkeypatch.setattr(training.Training, "take_step", die)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(path, out, CPU)
    taken = [7]
    run_sweep(path, out, CPU)
    assert 6 not in taken[: taken.index(9)]  # from the state after step 7, not from the point
    assert losses(out) == losses(whole)


def test_arms_of_a_trunk_that_fails_say_why(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    found = run_sweep(grid(("lr = 2e-3", "lr = 1e30"), extra=BRANCHED), out, CPU)
    assert len(found.failed) == found.left == 4
    assert all("trunk l1-h16-" in why and "the loss is" in why for why in found.failed.values())
    assert all("of 1099511627776" not in why for why in found.failed.values())


@pytest.mark.slow
def test_side_by_side_arms_wait_for_their_point(grid: Callable[..., Path], tmp_path: Path) -> None:
    path = grid(extra=BRANCHED)
    run_sweep(path, tmp_path / "one", CPU)
    found = run_sweep(path, tmp_path / "two", SweepOptions(device="cpu", workers=2))
    assert not found.failed
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def test_the_law_is_of_one_kind(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    run_sweep(grid(extra=f"[[parts]]\n{BRANCHED}"), out, CPU)
    with pytest.raises(DataError, match=r"2 .* from scratch and 4 branched.*--branched.*--force"):
        read_trainings([out])
    assert read_trainings([out], force=True)[0].height == 6
    branched, _ = read_trainings([out / "sweep.parquet"], branched=True)
    assert branched["trunk_tokens"].to_list() == [384, 384, 640, 640]
    assert read_trainings([out], branched=False)[0]["trunk_tokens"].to_list() == [None, None]
    for flag, said in (("--branched", "2"), ("--from-scratch", "1")):
        result = CliRunner().invoke(main, ["law", "fit", str(out), flag])
        assert "branched from a trunk" not in result.output
        assert said in result.output
    dry = CliRunner().invoke(
        main, ["sweep", str(tmp_path / "grid.toml"), "-o", str(out), "--dry-run"]
    )
    assert "0 of 6 trainings to do" in dry.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[384, 640]", "[]"), "trunk_tokens is"),
        (("[384, 640]", "[192]"), "trunk_tokens has 192, 3 steps, of which 3 are warmup"),
        (("[384, 640]", "[63]"), "trunk_tokens has 63, less than one batch"),
        (("[384, 640]", "[1e9]"), r"up to 1,000,000,2\d\d tokens"),
        (("trunk_tokens = [384, 640]", ""), "trunk_warmup_steps is of a trunk"),
        (("warmup_steps = 3", "seed = -1"), "trunk_seed has -1"),
    ],
)
def test_a_bad_trunk_is_refused(
    grid: Callable[..., Path], tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(BitplanError, match=said):
        run_sweep(grid(extra=BRANCHED.replace(*change)), tmp_path / "sweep", CPU)
    assert not (tmp_path / "sweep" / "runs").exists()
    assert not (tmp_path / "sweep" / "trunks").exists()


def test_the_committed_study_is_known() -> None:
    """Its text is not in the repository: these are the hashes that its tokens.json had."""
    tokens = Tokens(
        path="",
        source="text",
        text="2ce893c7f251fbe4727a513e36051fad",
        tokenizer="f86198349dff4eff",
        vocabulary=4096,
        eval_tokens=262144,
        seq_len=256,
        train_tokens=40665361,
        train="b0db2028962b0136",
        heldout="3f18c1d4fe919b4d",
    )
    value = {
        "tokens": [14.9e6, 37.7e6],
        "group_sizes": [32, 128, "row"],
        "precisions": list(PRECISIONS),
        "recipe": {"batch_size": 64, "seq_len": 256, "compiled": True},
        "models": [{"layers": 5, "hidden": 256, "ffn": 768, "heads": 4, "lr": 3e-3}],
    }
    cells = parse_grid(value).cells
    models = {shape: _model(shape, 4096, 256) for shape in {cell.shape for cell in cells}}
    tasks = [_task(cell, models[cell.shape], Path(), tokens, "cuda") for cell in cells]
    runs = {task.config_hash: task.run.name for task in tasks}
    trained = pl.read_parquet(STUDY / "sweep.parquet")  # it may grow by others
    known = trained.filter(pl.col("config_hash").is_in(list(runs)))
    assert known.height >= 13
    for config_hash, run in known.select("config_hash", "run").iter_rows():
        assert runs[config_hash] == run
