"""`bitplan verify` on a tiny checkpoint: the arms, the verdict's file, resuming, and bad input."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from click.testing import CliRunner

from bitplan.cli import main
from bitplan.errors import BitplanError, CheckpointError, DataError, PlanError, RunError
from bitplan.formats import parse_format
from bitplan.options import VerifyOptions
from bitplan.qat import judge, train, training, verify
from bitplan.qat.arms import ARMS, attribution_arms
from bitplan.qat.result import Verdict
from bitplan.qat.verdict import Interval
from bitplan.qat.verify import verify_plan
from bitplan.rundir import RunDir
from bitplan.tables import HELDOUT, METRICS, PROFILE, TRAINED

Make = Callable[..., Any]


def losses(run: Path) -> dict[tuple[str, int], list[float]]:
    """Held-out and training losses of every arm and seed on disk."""
    return {
        (path.parent.parent.name, int(path.parent.name.removeprefix("seed-"))): [
            *pl.read_parquet(path.parent / "heldout.parquet")["loss"],
            *pl.read_parquet(path.parent / "metrics.parquet")["loss"],
        ]
        for path in run.glob("arms/*/*/record.json")
    }


def mtimes(run: Path) -> dict[str, int]:
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}


def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Note which arms are trained from here on."""
    seen: list[tuple[str, int]] = []
    real = verify.train_arm

    def noting(run: Any, model: Any, job: Any, accelerator: Any) -> Any:
        seen.append((job.arm, job.seed))
        return real(run, model, job, accelerator)

    monkeypatch.setattr(verify, "train_arm", noting)
    return seen


def test_every_arm_leaves_its_files_and_the_verdict_adds_up(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ready()
    seen = trained(monkeypatch)
    found = verify_plan(at.run, at.options)
    # The plan keeps its weights at 4 bits: its weights-only arm is w4a16.
    assert [arm for arm, seed in seen if seed == 0] == [a for a in ARMS if a != "planned-weights"]
    for name in ARMS:
        for seed in (0, 1):
            place = at.run / "arms" / name / f"seed-{seed}"
            record = json.loads((place / "record.json").read_text())
            assert record["arm"] == name
            assert record["seed"] == seed
            assert record["same_as"] == ("w4a16" if name == "planned-weights" else None)
            assert pl.read_parquet(place / "metrics.parquet").schema == METRICS.schema
            assert pl.read_parquet(place / "stats.parquet").schema == PROFILE.schema
            assert pl.read_parquet(place / "heldout.parquet").schema == HELDOUT.schema
            assert "model" in json.loads(
                pl.read_parquet_metadata(place / "metrics.parquet")["bitplan"]
            )

    held = {
        name: np.array(
            [
                pl.read_parquet(at.run / f"arms/{name}/seed-{k}/heldout.parquet")["loss"].mean()
                for k in (0, 1)
            ]
        )
        for name in ARMS
    }
    value = json.loads((at.run / "verdict.json").read_text())
    for name in ARMS:
        entry = value["delta"][name]
        assert entry["estimate"] == pytest.approx((held[name] - held["bf16"]).mean(), abs=1e-12)
        assert entry["low"] <= entry["estimate"] <= entry["high"]
        assert entry["seeds"] == 2
    delta = {name: value["delta"][name]["estimate"] for name in ARMS}
    assert value["R"]["before"]["estimate"] == pytest.approx(delta["w16a4"] / delta["w4a16"])
    assert value["R"]["after"]["estimate"] == pytest.approx(
        delta["planned-inputs"] / delta["planned-weights"]
    )
    assert value["tolerance"] == [0.8, 1.25]
    assert set(value["noise"]) == {"bf16_seeds", "seed_std", "evaluation_stderr", "floor"}
    apart = held["bf16"][0] - held["bf16"][1]
    assert value["noise"]["bf16_seeds"] == pytest.approx(abs(apart))
    assert (value["seeds"], value["seeds_allowed"], value["confidence"]) == (2, 2, 0.95)
    assert value["verdict"] == found.verdict
    assert value["plan_id"] == at.plan.plan_id
    assert value["tokens"] == 4 * 2 * 32
    assert value["missing"] == []
    assert value == found.as_json()
    assert replace(Verdict.from_json(value), run=found.run) == found

    table = pl.read_parquet(at.run / "trained.parquet")
    assert table.schema == TRAINED.schema
    for name, operand in (("w4a16", "weight"), ("w16a4", "input"), ("planned-inputs", "input")):
        formats = {str(s): str(f) for s, f in ARMS[name].formats(at.plan).items()}
        (row,) = [r for r in table.to_dicts() if json.loads(r["formats"]) == formats]
        assert (row["operand"], row["delta"]) == (operand, delta[name])
        assert (row["seeds"], row["tokens"]) == (2, value["tokens"])
    assert table.height == 3  # the plan's weights are those of w4a16

    lines = found.as_text().splitlines()
    assert lines[0].startswith(found.verdict)
    assert any(line.startswith("planned-weights") and "(as w4a16)" in line for line in lines)
    assert lines[-1] == f"next: bitplan report {at.run}"


def test_attribution_measures_each_role_and_stays(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ready(steps=1)
    plain = verify_plan(at.run, at.options)
    assert plain.attribution == ()
    seen = trained(monkeypatch)
    found = verify_plan(at.run, replace(at.options, attribute=True))
    arms = attribution_arms(at.plan)
    # The plan is every FC2 input at 8 bits: that arm is `planned`, trained already.
    assert {arm for arm, _ in seen} == {a.name for a in arms.values()} - {"w4a4-fc2-input-8"}
    value = json.loads((at.run / "verdict.json").read_text())
    delta = {name: entry["estimate"] for name, entry in value["delta"].items()}
    for (role, operand), arm in arms.items():
        entry = value["attribution"][role]
        given_back = delta["w4a4"] - delta[arm.name]
        assert entry[operand]["estimate"] == pytest.approx(given_back, abs=1e-12)
        assert entry[operand]["low"] <= given_back <= entry[operand]["high"]
    fc2 = value["attribution"]["fc2"]
    assert fc2["R"]["estimate"] == pytest.approx(
        fc2["input"]["estimate"] / fc2["weight"]["estimate"]
    )
    assert replace(Verdict.from_json(value), run=found.run) == found
    assert "What each role gives back" in found.as_text()
    # Asked without it, what was trained is still told.
    again = verify_plan(at.run, at.options)
    assert again.attribution == found.attribution


ENOUGH = ("bf16", "planned-weights", "planned-inputs")  # for a verdict


def settling(monkeypatch: pytest.MonkeyPatch, seeds: int) -> None:
    """Let the verdict be settled from so many seeds on, whatever the losses are."""
    real = judge.arithmetic.ratio

    def ratio(inputs: Any, weights: Any, looks: Any) -> Interval:
        found = real(inputs, weights, looks)
        return replace(found, low=1.0, high=1.0 if len(inputs) >= seeds else 2.0)

    monkeypatch.setattr(judge.arithmetic, "ratio", ratio)


@pytest.mark.parametrize(("workers", "enough"), [(None, 4), (2, 3)])
def test_until_settled_trains_seed_by_seed_and_stops(
    ready: Make, monkeypatch: pytest.MonkeyPatch, workers: int | None, enough: int
) -> None:
    settling(monkeypatch, enough)
    at = ready(steps=1, seeds=5, until_settled=True, workers=workers, arms=ENOUGH)
    found = verify_plan(at.run, at.options)
    assert found.verdict == "converged"
    assert (found.seeds, found.seeds_allowed) == (enough, 5)
    assert f"Settled after {enough} of at most 5 seeds" in found.as_text()
    assert {seed for _, seed in losses(at.run)} == set(range(enough))
    assert all(arm.seeds == enough for arm in found.arms)
    assert verify_plan(at.run, at.options).up_to_date
    # All five, and the first are not trained again.
    seen = trained(monkeypatch)
    whole = verify_plan(at.run, replace(at.options, until_settled=False, workers=None))
    assert {seed for _, seed in seen} == set(range(enough, 5))
    assert whole.seeds == 5
    assert "Settled after" not in whole.as_text()


def test_until_settled_trains_all_seeds_where_nothing_settles(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settling(monkeypatch, 9)
    at = ready(steps=1, seeds=4, until_settled=True, arms=ENOUGH)
    found = verify_plan(at.run, at.options)
    assert (found.verdict, found.seeds) == ("undetermined", 4)
    assert {seed for _, seed in losses(at.run)} == {0, 1, 2, 3}


def test_the_tail_that_is_averaged_is_part_of_the_recipe(ready: Make) -> None:
    at = ready(steps=2, seeds=1, arms=("bf16",), lr=1e-2)
    last = verify_plan(at.run, at.options).arms[0].loss
    assert verify_plan(at.run, replace(at.options, average_tail=1.0)).arms[0].loss != last
    record = json.loads((at.run / "arms/bf16/seed-0/record.json").read_text())
    assert record["config"]["recipe"]["average_tail"] == 1.0


def test_less_confidence_is_narrower_and_trains_nothing(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ready(steps=1, arms=("bf16", "w4a16"))
    sure = verify_plan(at.run, at.options)
    seen = trained(monkeypatch)
    less = verify_plan(at.run, replace(at.options, confidence=0.5))
    assert seen == []
    assert "Intervals are 50%" in less.as_text()
    assert less.noise["floor"] < sure.noise["floor"]


def test_attribution_needs_a_format_of_8_bits(ready: Make) -> None:
    at = ready(high=())
    narrow = replace(at.plan, formats=("int4-g16",))
    (at.run / "plan.json").write_text(json.dumps(narrow.as_json()))
    with pytest.raises(PlanError, match="--attribute puts one role at 8 bits"):
        verify_plan(at.run, replace(at.options, attribute=True))


def test_the_same_options_twice_are_up_to_date(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ready(arms=("bf16", "w4a4"), seeds=1)
    first = verify_plan(at.run, at.options)
    before = mtimes(at.run)
    seen = trained(monkeypatch)
    second = verify_plan(at.run, at.options)
    assert second.up_to_date
    assert replace(second, up_to_date=False) == first
    assert mtimes(at.run) == before
    assert seen == []
    assert "is up to date" in second.as_text()


def test_two_runs_have_the_same_losses_to_the_bit(ready: Make) -> None:
    arms = ("bf16", "planned-weights", "planned-inputs")
    one, two = (ready(name=name, seeds=1, arms=arms) for name in ("one", "two"))
    verify_plan(one.run, one.options)
    verify_plan(two.run, two.options)
    found = losses(one.run)
    assert len(found) == len(arms)
    assert found == losses(two.run)
    texts = [json.loads((at.run / "verdict.json").read_text()) for at in (one, two)]
    assert texts[0] == texts[1]


def test_arms_share_their_batches_and_seeds_do_not(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ready(arms=("bf16", "w4a4"))
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    real_step, real_losses = training.Training.take_step, training.sequence_losses
    current: list[tuple[str, int]] = []

    def step(self: Any, index: int) -> None:
        current[:] = [(self.job.arm, self.job.seed)]
        real_step(self, index)

    def noting(model: Any, ids: torch.Tensor, **named: Any) -> torch.Tensor:
        if model.training:
            seen.setdefault(current[0], []).append(ids.clone())
        return real_losses(model, ids, **named)

    monkeypatch.setattr(training.Training, "take_step", step)
    monkeypatch.setattr(training, "sequence_losses", noting)
    verify_plan(at.run, at.options)
    assert set(seen) == {(arm, seed) for arm in ("bf16", "w4a4") for seed in (0, 1)}
    assert [ids.shape for ids in seen["bf16", 0]] == [(2, 32)] * 4
    for seed in (0, 1):
        pairs = zip(seen["bf16", seed], seen["w4a4", seed], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(torch.cat(seen["bf16", 0]), torch.cat(seen["bf16", 1]))
    records = [json.loads(p.read_text()) for p in at.run.glob("arms/*/*/record.json")]
    assert len({record["config"]["heldout"] for record in records}) == 1
    assert len({record["config"]["train"] for record in records}) == 2


def test_a_killed_verify_goes_on_where_it_stopped(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = ("bf16", "w16a4", "w4a4")
    whole, killed = (ready(name=name, seeds=1, arms=arms) for name in ("whole", "killed"))
    verify_plan(whole.run, whole.options)
    real = training.Training.take_step

    def dying(self: Any, step: int) -> None:
        if self.job.arm == "w16a4" and step == 2:
            raise KeyboardInterrupt
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "take_step", dying)
        patch.setattr(verify, "train_arm", partial(train.train_arm, save_every_s=0.0))
        with pytest.raises(KeyboardInterrupt):
            verify_plan(killed.run, killed.options)
    assert not (killed.run / "verdict.json").exists()
    assert list((killed.run / "arms/w16a4/seed-0").glob("state-*"))
    seen = trained(monkeypatch)
    verify_plan(killed.run, killed.options)
    assert seen == [("w16a4", 0), ("w4a4", 0)]
    assert losses(killed.run) == losses(whole.run)
    assert not list(killed.run.rglob("*.pt"))


def test_an_arm_that_diverges_is_missing_and_the_others_are_judged(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ready(arms=("bf16", "w16a4", "w4a16"), seeds=1)
    real = training.Training.take_step

    def breaking(self: Any, step: int) -> None:
        if self.job.arm == "w16a4" and step == 2:
            with torch.no_grad():
                self.plain.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "take_step", breaking)
        found = verify_plan(at.run, at.options)
    assert {arm.name for arm in found.arms} == {"bf16", "w4a16"}
    assert found.verdict == "undetermined"
    (note,) = [note for note in found.notes if "could not be trained" in note]
    assert note.startswith("w16a4 could not be trained with seed 0: the loss is nan at step 3 of 4")
    assert "first site that is not finite: model.layers.1.mlp.up_proj:weight" in note
    assert note in found.as_text()
    # The arm alone is trained, once it can be.
    seen = trained(monkeypatch)
    again = verify_plan(at.run, replace(at.options, arms=("w16a4", "w4a16")))
    assert seen == [("w16a4", 0)]
    assert not any("could not be trained" in note for note in again.notes)


def test_arms_in_portions_and_a_new_plan_train_only_what_is_new(
    ready: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ready(arms=("bf16", "w4a16"), seeds=1)
    part = verify_plan(at.run, at.options)
    assert part.verdict == "undetermined"
    assert "not trained yet: planned-weights, planned-inputs" in part.sentence
    assert part.missing == ("w16a4", "w4a4", "planned", "planned-weights", "planned-inputs")
    assert part.before.estimate is None
    seen = trained(monkeypatch)
    whole = verify_plan(at.run, replace(at.options, arms=()))
    assert [arm for arm, _ in seen] == ["w16a4", "w4a4", "planned", "planned-inputs"]
    assert whole.missing == ()
    assert "One seed" in whole.as_text()
    # Without bf16 there is nothing to tell a delta from.
    alone = ready(name="alone", arms=("w4a16",), seeds=1)
    verdict = verify_plan(alone.run, alone.options)
    assert verdict.as_json()["delta"] == {}
    assert "bf16" in verdict.sentence

    other = ready(name="new", high=("fc1", "fc2"), seeds=1)
    (at.run / "plan.json").write_bytes((other.run / "plan.json").read_bytes())
    seen.clear()
    again = verify_plan(at.run, replace(at.options, arms=()))
    assert [arm for arm, _ in seen] == ["planned", "planned-inputs"]
    assert again.plan_id == other.plan.plan_id != whole.plan_id


def test_mixture_of_experts_and_conv1d_checkpoints_train(ready: Make) -> None:
    for family in ("qwen3_moe", "gpt2"):
        at = ready(family, name=family, arms=("bf16", "w4a4"), seeds=1, steps=2)
        found = verify_plan(at.run, at.options)
        assert [arm.name for arm in found.arms] == ["bf16", "w4a4"]


def changed(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_bad_input_is_told_and_leaves_everything_as_it_was(
    ready: Make, tmp_path: Path, checkpoints: Callable[[str], Path]
) -> None:
    at = ready()
    before = mtimes(at.run)

    def refused(error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            verify_plan(at.run, replace(at.options, **options))
        assert mtimes(at.run) == before

    refused(BitplanError, "--steps 4 and --tokens 100", tokens=100)
    refused(BitplanError, "no arm w4a5: the arms are bf16", arms=("w4a5",))
    refused(BitplanError, "--lr 0", lr=0.0)
    refused(BitplanError, "--seq-len 500 is more than the 128 positions", seq_len=500)
    refused(DataError, r"the train part", steps=100_000)
    refused(DataError, r"the heldout part", eval_tokens=10_000_000)
    (tmp_path / "empty.txt").write_text("")
    refused(DataError, "empty", data=(str(tmp_path / "empty.txt"),))
    with RunDir.open(at.run).lock():
        refused(RunError, "in use")
    with pytest.raises(RunError, match="no run directory"):
        verify_plan(tmp_path / "nothing", at.options)

    (tmp_path / "short.txt").write_text("alpha beta gamma delta\n" * 80)
    little = {"data": (str(tmp_path / "short.txt"),), "eval_tokens": 32}
    batch = "less than one batch of 80 sequences of 32 tokens: .* a smaller --batch-size or --seq"
    refused(DataError, batch, steps=1, batch_size=80, **little)
    refused(DataError, r"has [\d,]+: give more text .* or ask for fewer", steps=40, **little)
    little |= {"seq_len": 128, "eval_tokens": 1}
    (tmp_path / "short.txt").write_text("alpha beta gamma delta\n" * 40)
    refused(DataError, "heldout part .* less than one sequence of 128 tokens: .* --seq", **little)

    bert = ready("bert", name="bert")
    with pytest.raises(CheckpointError, match="predicts no next token"):
        verify_plan(bert.run, bert.options)


def test_a_tokenizer_that_does_not_fit_is_refused_before_training(ready: Make) -> None:
    at = ready("narrow")
    before = mtimes(at.run)
    with pytest.raises(CheckpointError, match=r"token \d{3}, its embedding has 100: they do not"):
        verify_plan(at.run, at.options)
    assert mtimes(at.run) == before


def test_short_groups_and_a_tied_head_are_told_once(ready: Make) -> None:
    at = ready(steps=1, seeds=1, arms=("bf16",))
    # Rows of 32 elements are two groups of 16, those of 40, FC2's, two and a half.
    short = "rows of 4 sites end in a shorter group (groups of 16 in rows of 40)"
    notes = verify_plan(at.run, at.options).notes
    assert [short in note for note in notes].count(True) == 1
    assert not any("embedding" in note for note in notes)

    sites = tuple(
        replace(choice, format=parse_format("int4-g16"))
        if choice.site == "lm_head:weight"
        else choice
        for choice in at.plan.sites
    )
    RunDir.open(at.run).write_json("plan.json", replace(at.plan, sites=sites).as_json())
    (tied,) = [note for note in verify_plan(at.run, at.options).notes if "embedding" in note]
    assert tied.startswith("lm_head shares its weight with the embedding: it is int4-g16 where")


def test_a_plan_for_another_checkpoint_is_refused(ready: Make) -> None:
    at = ready()
    manifest = json.loads((at.run / "run.json").read_text())
    model = manifest["model"]
    changed(at.run / "run.json", model=model | {"content_hash": "0" * 32})
    with pytest.raises(PlanError, match="the plan was made for another checkpoint"):
        verify_plan(at.run, at.options)
    plan = json.loads((at.run / "plan.json").read_text())
    provenance = plan["provenance"] | {"model": model | {"content_hash": "0" * 32}}
    changed(at.run / "plan.json", provenance=provenance)
    with pytest.raises(PlanError, match="has changed since it was profiled"):
        verify_plan(at.run, at.options)
    (at.run / "plan.json").unlink()
    with pytest.raises(RunError, match="bitplan plan"):
        verify_plan(at.run, at.options)
    assert not (at.run / "arms").exists()


def flags(options: VerifyOptions) -> list[str]:
    names = ("steps", "seeds", "batch_size", "seq_len", "eval_tokens", "lr", "device")
    values = asdict(options)
    given = [f"--{name.replace('_', '-')}={values[name]}" for name in names]
    return [*given, f"--data={options.data[0]}"]


def test_exit_codes(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    at = ready(seeds=1, steps=2)
    runner = CliRunner()
    command = ["verify", str(at.run), "--arms", "bf16,w4a4", *flags(at.options)]
    bad = runner.invoke(main, [*command, "--tokens", "64"])
    assert (bad.exit_code, bad.stdout) == (2, "")
    assert len(bad.stderr.splitlines()) == 1
    # R needs other arms: undetermined, so the answer is no.
    answer = runner.invoke(main, [*command, "--json"])
    assert answer.exit_code == 1
    assert json.loads(answer.stdout) == json.loads((at.run / "verdict.json").read_text())

    real = verify.verify_plan

    def converged(run: Path, options: VerifyOptions) -> Verdict:
        return replace(real(run, options), verdict="converged")

    monkeypatch.setattr(verify, "verify_plan", converged)
    assert runner.invoke(main, command).exit_code == 0


def test_from_scratch_arms_of_a_seed_share_random_weights(ready: Make, tmp_path: Path) -> None:
    at = ready(steps=1, arms=("bf16", "w4a16"))
    source = json.loads((at.run / "run.json").read_text())["model"]["source"]
    config = tmp_path / "config.json"
    config.write_text((Path(source) / "config.json").read_text())
    known = replace(at.options, from_scratch=str(config), lr=1e-30)
    found = verify_plan(at.run, known)
    mean = {arm.name: arm.loss for arm in found.arms}
    # Untrained weights know nothing of the text, whatever they are rounded to.
    uniform = np.log(transformers.AutoConfig.from_pretrained(source).vocab_size)
    assert mean == pytest.approx(dict.fromkeys(mean, uniform), rel=0.05)
    first, second = (losses(at.run)["bf16", seed] for seed in (0, 1))
    assert first[0] != second[0]  # the same held-out sequence: seeds draw other weights
    assert any("From scratch" in note for note in found.notes)
    checkpoint = verify_plan(at.run, replace(at.options, lr=1e-30))
    assert {arm.name: arm.loss for arm in checkpoint.arms} != mean


def test_from_scratch_refuses_what_the_plan_is_not_for(ready: Make, tmp_path: Path) -> None:
    at = ready(arms=("bf16",))
    source = json.loads((at.run / "run.json").read_text())["model"]["source"]
    config = json.loads((Path(source) / "config.json").read_text())
    place = tmp_path / "config.json"
    asked = replace(at.options, from_scratch=str(place))
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        verify_plan(at.run, asked)
    place.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(PlanError, match="the plan lacks"):
        verify_plan(at.run, asked)
    place.write_text(json.dumps({**config, "vocab_size": 20}))
    with pytest.raises(CheckpointError, match="a vocabulary of 20"):
        verify_plan(at.run, asked)
    assert not (at.run / "arms").exists()


def test_arms_side_by_side_are_the_same_arms(ready: Make) -> None:
    alone, together = ready(name="alone"), ready(name="together")
    asked = replace(alone.options, arms=("bf16", "w4a4"), seeds=1)
    verify_plan(alone.run, asked)
    verify_plan(together.run, replace(asked, workers=2))
    assert losses(alone.run).keys() == losses(together.run).keys()
    for key, expected in losses(alone.run).items():
        assert losses(together.run)[key] == pytest.approx(expected, rel=1e-5)
    # How many at once is no part of what was asked.
    assert verify_plan(together.run, replace(asked, workers=1)).up_to_date


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has GPUs")
def test_gpus_that_are_not_there_are_told(ready: Make) -> None:
    at = ready(arms=("bf16",))
    with pytest.raises(BitplanError, match="--gpus 2 is for CUDA, and the device is cpu"):
        verify_plan(at.run, replace(at.options, gpus=2))
