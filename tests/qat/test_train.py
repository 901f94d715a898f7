"""One arm: deterministic, resumable to the bit, and clear about what stops it."""

import errno
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from bitplan.errors import DivergedError, RunError, TrainingError
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.qat import record as files
from bitplan.qat import state, training
from bitplan.qat.arms import ARMS
from bitplan.qat.job import Job
from bitplan.qat.recipe import Recipe, share_of_peak
from bitplan.qat.state import find_states
from bitplan.qat.train import make_accelerator, train_arm
from bitplan.rundir import RunDir
from bitplan.tables import METRICS, PROFILE

RECIPE = Recipe(steps=5, batch_size=2, seq_len=24, lr=1e-3)


@pytest.fixture
def model(checkpoints: Callable[[str], Path]) -> Any:
    return load_checkpoint(str(checkpoints("llama")), device="cpu").model


@pytest.fixture
def job(ready: Callable[..., Any]) -> Job:
    generator = torch.Generator().manual_seed(0)
    return Job(
        arm="planned",
        seed=3,
        formats=ARMS["planned"].formats(ready().plan),
        quantizers={},
        recipe=RECIPE,
        train=torch.randint(0, 257, (10, 24), generator=generator),
        heldout=torch.randint(0, 257, (5, 24), generator=generator),
        context={"model": "abc"},
    )


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], RunDir]:
    def make(name: str) -> RunDir:
        directory = RunDir.create(tmp_path / name)
        with directory.lock():
            directory.finish("profile", {}, [])
        return directory

    return make


CPU = torch.device("cpu")


def results(run: RunDir, job: Job) -> dict[str, pl.DataFrame]:
    """The arm's tables, without the clock."""
    return {
        name: run.read_table(f"{files.arm_dir(job.arm, job.seed)}/{name}").drop(
            "seconds", strict=False
        )
        for name in files.TABLE_FILES
    }


def assert_equal(found: dict[str, pl.DataFrame], expected: dict[str, pl.DataFrame]) -> None:
    for name, frame in expected.items():
        assert found[name].equals(frame), name


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training die as step `step`, from 0, begins."""
    real = training.share_of_peak

    def dying(at: int, recipe: Recipe) -> float:
        if at == step:
            raise Killed
        return real(at, recipe)

    monkeypatch.setattr(training, "share_of_peak", dying)


def test_the_same_job_twice_gives_the_same_files_to_the_bit(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    first, second = run("a"), run("b")
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    record = train_arm(first, model, job, make_accelerator(CPU))
    assert all(torch.equal(value, initial[name]) for name, value in model.state_dict().items())
    train_arm(second, model, job, make_accelerator(CPU))
    assert_equal(results(second, job), results(first, job))

    metrics = results(first, job)["metrics.parquet"]
    assert metrics.columns == [c for c in METRICS.schema if c != "seconds"]
    assert metrics["step"].to_list() == [1, 2, 3, 4, 5]
    assert metrics["tokens"].to_list() == [48 * i for i in range(1, 6)]
    stats = results(first, job)["stats.parquet"]
    assert stats.columns == list(PROFILE.schema)
    assert stats["step"].unique().sort().to_list() == [2, 4]
    assert stats.filter(pl.col("operand") == "weight")["drift"].min() > 0  # type: ignore[operator]
    losses = files.heldout_losses(first, job.arm, job.seed)
    assert losses.shape == (5,)
    assert record["loss"]["heldout"] == pytest.approx(losses.mean())
    assert record["tokens"] == 5 * 48
    assert record["num_quantized_sites"] == len(job.formats) == 28
    assert not find_states(first.path / files.arm_dir(job.arm, job.seed))


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_training_goes_on_to_the_same_losses(
    model: Any,
    job: Job,
    run: Callable[[str], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    whole, killed = run("whole"), run("killed")
    job = replace(job, recipe=replace(RECIPE, average_tail=0.6))
    train_arm(whole, model, job, make_accelerator(CPU))
    place = killed.path / files.arm_dir(job.arm, job.seed)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train_arm(killed, model, job, make_accelerator(CPU), save_every_s=0)
    kept = [f"state-{at:08d}" for at in range(step, max(step - 2, 0), -1)]
    assert [path.name for path in find_states(place)] == kept
    (place / f".state-{step + 1:08d}").mkdir()  # what a kill left
    with monkeypatch.context() as patch:
        kill_at(patch, step - 1)  # a step that was taken is not taken again
        train_arm(killed, model, job, make_accelerator(CPU))
    assert_equal(results(killed, job), results(whole, job))
    assert sorted(path.name for path in place.iterdir()) == sorted(
        (*files.TABLE_FILES, files.RECORD_FILE)
    )


def test_the_average_of_the_tail_is_what_is_judged(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    """At a rate of next to nothing the tail is the weights; at a large one it is not."""
    for lr, equal in ((1e-12, True), (1e-2, False)):
        plain = replace(job, recipe=replace(RECIPE, lr=lr))
        tail = replace(job, recipe=replace(RECIPE, lr=lr, average_tail=0.8))
        directories = run(f"plain{lr}"), run(f"tail{lr}")
        for directory, each in zip(directories, (plain, tail), strict=True):
            train_arm(directory, model, each, make_accelerator(CPU))
        a, b = (
            directory.read_table(f"{files.arm_dir(job.arm, job.seed)}/{files.HELDOUT_FILE}")["loss"]
            for directory in directories
        )
        assert (a.to_list() == pytest.approx(b.to_list(), abs=1e-5)) == equal
        names = (files.METRICS_FILE, files.STATS_FILE)
        found, expected = results(directories[1], tail), results(directories[0], plain)
        assert_equal({n: found[n] for n in names}, {n: expected[n] for n in names})


def test_the_state_of_another_configuration_is_not_taken_up(
    model: Any, job: Job, run: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, clean = run("a"), run("b")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train_arm(directory, model, job, make_accelerator(CPU), save_every_s=0)
    other = replace(job, recipe=replace(RECIPE, lr=2e-3))
    train_arm(directory, model, other, make_accelerator(CPU))
    train_arm(clean, model, other, make_accelerator(CPU))
    assert_equal(results(directory, other), results(clean, other))


def damage(state: Path) -> None:
    (piece,) = state.iterdir()
    content = bytearray(piece.read_bytes())
    content[len(content) // 2 :] = b"no state"
    piece.write_bytes(content)


def test_a_state_that_cannot_be_read_gives_way_to_the_one_before(
    model: Any,
    job: Job,
    run: Callable[[str], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, killed = run("whole"), run("killed")
    train_arm(whole, model, job, make_accelerator(CPU))
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            train_arm(killed, model, job, make_accelerator(CPU), save_every_s=0)
    last, _ = find_states(killed.path / files.arm_dir(job.arm, job.seed))
    damage(last)
    train_arm(killed, model, job, make_accelerator(CPU))
    said = capsys.readouterr().err
    assert "state-00000004 cannot be read" in said
    assert "going on from the state before it, state-00000003" in said
    assert_equal(results(killed, job), results(whole, job))


def test_states_that_can_none_be_read_are_told(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    directory = run("a")
    path = directory.path / files.arm_dir(job.arm, job.seed) / "state-00000002"
    path.mkdir(parents=True)
    with pytest.raises(RunError, match=r"state-00000002 cannot be read \(0 of its pieces"):
        train_arm(directory, model, job, make_accelerator(CPU))
    (path / "piece-0-of-1.pt").write_bytes(b"no state")
    with pytest.raises(RunError, match=r"state-00000002 cannot be read .*delete it to start"):
        train_arm(directory, model, job, make_accelerator(CPU))


def test_a_full_disk_says_so_and_leaves_the_last_states(
    model: Any, job: Job, run: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the third state on, half of which fits; then there is room again."""
    whole, directory = run("whole"), run("a")
    train_arm(whole, model, job, make_accelerator(CPU))
    place = directory.path / files.arm_dir(job.arm, job.seed)
    with monkeypatch.context() as patch:
        real = state._write

        class Full(io.BufferedWriter):
            def write(self, content: Any) -> int:
                if self.tell() + len(content) > 30_000:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(content)

        def write(value: Any, file: Any) -> None:
            full = value["step"] == 3
            real(value, Full(io.FileIO(file.fileno(), "wb", closefd=False)) if full else file)

        patch.setattr(state, "_write", write)
        with pytest.raises(RunError, match=r"piece-0-of-1\.pt: No space left on device; what was"):
            train_arm(directory, model, job, make_accelerator(CPU), save_every_s=0)
    assert sorted(path.name for path in place.iterdir()) == ["state-00000001", "state-00000002"]
    train_arm(directory, model, job, make_accelerator(CPU))
    assert_equal(results(directory, job), results(whole, job))


def test_parts_of_a_step_change_the_rounding_alone(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    whole, parts = run("whole"), run("parts")
    recipe = replace(RECIPE, batch_size=5)
    train = job.train.repeat(3, 1)[:25]
    job = replace(job, recipe=recipe, train=train)
    in_parts = replace(job, accumulate=2)  # of three and of two rows
    assert in_parts.config_hash == job.config_hash
    train_arm(whole, model, job, make_accelerator(CPU))
    train_arm(parts, model, in_parts, make_accelerator(CPU))
    for name, frame in results(whole, job).items():
        assert_frame_equal(results(parts, job)[name], frame, rel_tol=2e-4, abs_tol=1e-5)


def test_training_lowers_the_loss(model: Any, job: Job, run: Callable[[str], RunDir]) -> None:
    directory = run("a")
    same = job.train[:2].repeat(15, 1)
    longer = replace(job, recipe=replace(RECIPE, steps=15, lr=1e-2), train=same)
    train_arm(directory, model, longer, make_accelerator(CPU))
    losses = results(directory, longer)["metrics.parquet"]["loss"]
    assert losses[-1] < losses[0] - 0.5
    assert abs(losses[0] - math.log(257)) < 0.5


def test_the_first_loss_and_gradient_are_those_of_plain_torch(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    directory = run("a")
    plain = replace(job, arm="bf16", formats={})
    train_arm(directory, model, plain, make_accelerator(CPU))
    loss = model(input_ids=job.train[:2], labels=job.train[:2]).loss  # transformers' own
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    row = results(directory, plain)["metrics.parquet"].row(0, named=True)
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_dropout_masks_are_shared_and_leave_the_callers_generator_alone(
    build: Callable[[str], Any], run: Callable[[str], RunDir], job: Job
) -> None:
    model = build("gpt2")  # trains with dropout
    plain = replace(job, formats={}, recipe=replace(RECIPE, steps=2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_arm(run("a"), model, plain, make_accelerator(CPU))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    directory = run("b")
    train_arm(directory, model, plain, make_accelerator(CPU))
    assert_equal(results(directory, plain), results(run("a"), plain))


def test_a_loss_that_is_not_finite_names_step_and_site(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    directory = run("a")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = math.nan
    expected = (
        r"arm planned, seed 3: the loss is nan at step 1 of 5; first site that is not finite: "
        r"model\.layers\.1\.self_attn\.o_proj:weight; lower --lr \(now 0\.001\)"
    )
    with pytest.raises(TrainingError, match=expected):
        train_arm(directory, model, job, make_accelerator(CPU))
    assert not list(directory.path.glob("arms/**/record.json"))


def test_an_input_that_is_not_finite_is_named(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = math.inf
    with pytest.raises(TrainingError, match=r"finite: model\.layers\.1\.mlp\.gate_proj:input"):
        train_arm(run("a"), model, job, make_accelerator(CPU))


def test_a_loss_that_stops_being_finite_leaves_the_last_good_state(
    model: Any, job: Job, run: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run("a")
    place = directory.path / files.arm_dir(job.arm, job.seed)
    real = training.sequence_losses
    with monkeypatch.context() as patch:
        losses = itertools.count()
        patch.setattr(
            training,
            "sequence_losses",
            lambda *args, **named: real(*args, **named) * (math.inf if next(losses) == 2 else 1),
        )
        with pytest.raises(DivergedError, match=r"inf at step 3 of 5; .*: none, the gradient is"):
            train_arm(directory, model, job, make_accelerator(CPU))
    assert [path.name for path in find_states(place)] == ["state-00000002"]
    reason = files.stopped(directory, job.arm, job.seed, job.config_hash)
    assert reason is not None
    assert reason.startswith("the loss is inf at step 3 of 5")
    assert files.stopped(directory, job.arm, job.seed, "another") is None
    # Had it been a passing fault, the training would go on from there, as if nothing had been.
    train_arm(directory, model, job, make_accelerator(CPU))
    whole = run("whole")
    train_arm(whole, model, job, make_accelerator(CPU))
    assert_equal(results(directory, job), results(whole, job))
    assert files.stopped(directory, job.arm, job.seed, job.config_hash) is None


@pytest.mark.parametrize(
    ("fits", "advice"),
    [
        (5, r"with 10 sequences of 24 tokens at once: 5 .* at once fit: --accumulate 2, which"),
        (2, r"with 10 sequences of 24 tokens at once: 2 .* at once fit: --accumulate 5, which"),
        (0, r"with 10 sequences of 24 tokens at once: try --seq-len 12"),
    ],
)
def test_running_out_of_memory_names_what_fits(
    model: Any,
    job: Job,
    run: Callable[[str], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    fits: int,
    advice: str,
) -> None:
    real = training.sequence_losses

    def full(model: Any, ids: torch.Tensor, **named: Any) -> torch.Tensor:
        if len(ids) > fits:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return real(model, ids, **named)

    monkeypatch.setattr(training, "sequence_losses", full)
    large = replace(job, recipe=replace(RECIPE, batch_size=10, steps=1))
    directory = run("a")
    with pytest.raises(TrainingError, match=advice):
        train_arm(directory, model, large, make_accelerator(CPU))
    assert not list(directory.path.glob("arms/*/*/*"))  # what was tried has left nothing
    if fits:
        parts = int(advice.partition("--accumulate ")[2].partition(",")[0])
        train_arm(directory, model, replace(large, accumulate=parts), make_accelerator(CPU))


def test_compiled_training_is_for_one_gpu(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    compiled = replace(job, recipe=replace(RECIPE, compiled=True))
    with pytest.raises(TrainingError, match="for one process on a GPU, and this is cpu with 1"):
        train_arm(run("a"), model, compiled, make_accelerator(CPU))


def test_a_compiled_recipe_compiles_every_block(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    compiled = replace(job, recipe=replace(RECIPE, compiled=True))
    compiled_training = training.Training(run("a"), model, compiled, make_accelerator(CPU))
    assert compiled_training.passes.blocks == list(compiled_training.plain.model.layers)
    plain = training.Training(run("b"), model, job, make_accelerator(CPU))
    assert plain.passes.blocks == []


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    recipe = replace(RECIPE, steps=100, warmup_share=0.1)
    rates = np.array([recipe.lr * share_of_peak(step, recipe) for step in range(101)])
    assert rates[:10] == pytest.approx(np.arange(1, 11) * 1e-4)
    assert rates.max() == rates[10] == 1e-3
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[100] == pytest.approx(1e-4)


def test_wsd_holds_the_peak_and_decays_in_the_last_fifth() -> None:
    recipe = replace(RECIPE, steps=100, warmup_share=0.1, schedule="wsd")
    shares = np.array([share_of_peak(step, recipe) for step in range(101)])
    assert shares[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert (shares[10:81] == 1).all()
    assert np.diff(shares[80:]) == pytest.approx(-0.9 / 20)
    assert shares[100] == pytest.approx(0.1)


def test_an_arm_is_finished_only_under_its_own_configuration(
    model: Any, job: Job, run: Callable[[str], RunDir]
) -> None:
    directory = run("a")
    assert files.finished(directory, job.arm, job.seed, job.config_hash) is None
    record = train_arm(directory, model, job, make_accelerator(CPU))
    assert files.finished(directory, job.arm, job.seed, job.config_hash) == record
    other = replace(job, recipe=replace(RECIPE, lr=2e-3))
    assert files.finished(directory, job.arm, job.seed, other.config_hash) is None
    files.copy_arm(directory, record, "planned-weights")
    twin = replace(job, arm="planned-weights")
    copied = files.finished(directory, twin.arm, twin.seed, twin.config_hash)
    assert copied == record | {"arm": "planned-weights", "same_as": "planned"}
    assert_equal(results(directory, twin), results(directory, job))
    (directory.path / files.arm_dir(job.arm, job.seed) / files.STATS_FILE).unlink()
    assert files.finished(directory, job.arm, job.seed, job.config_hash) is None
