"""Plans measured whole: against a converted model, kept, resumed, refined, and refused."""

import shutil
from dataclasses import replace

import polars as pl
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from bitplan.cli import main
from bitplan.errors import CheckpointError, DataError, PlanError
from bitplan.options import PlanOptions, ProfileOptions
from bitplan.planner.stage import make_plan
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.profile import profile_checkpoint
from bitplan.probe.text import load_text, tokenize
from bitplan.qat import measure
from bitplan.qat.convert import convert
from bitplan.qat.measure import make_measured_plan
from bitplan.sites import Site

FORMATS = ("int3-g16", "int8-g16")
OPTIONS = PlanOptions(input_bits=6.5, weight_bits=6.5, formats=FORMATS, measure=12)
TOKENS, SEQ_LEN = 512, 32


def profile(directory, model, text, **options):
    asked = {"tokens": TOKENS, "seq_len": SEQ_LEN, "formats": FORMATS, "device": "cpu"} | options
    profile_checkpoint(directory, ProfileOptions(model=str(model), data=(str(text),), **asked))
    return directory


@pytest.fixture(scope="module")
def profiled(checkpoints, text, tmp_path_factory):
    return profile(tmp_path_factory.mktemp("measured") / "run", checkpoints("llama"), text)


@pytest.fixture
def run(profiled, tmp_path):
    return shutil.copytree(profiled, tmp_path / "run")


def rows(run):
    return pl.read_parquet(run / "measured.parquet")


def converted_cost(plan, model, text):
    """Return change of loss and KL of a plan by the model that trains under it."""
    checkpoint = load_checkpoint(str(model), device="cpu")
    ids = tokenize(
        load_text((str(text),)),
        checkpoint.tokenizer,
        "calibration",
        tokens=TOKENS,
        seq_len=SEQ_LEN,
        seed=0,
    )

    def log_shares():
        with torch.no_grad():
            return checkpoint.model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)

    before = log_shares()
    convert(checkpoint.model, {Site.parse(site): f for site, f in plan.assignment.items()})
    after = log_shares()
    labels = ids[:, 1:].flatten()
    loss = [F.nll_loss(one.flatten(0, 1), labels).item() for one in (before, after)]
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    return loss[1] - loss[0], kl, ids.numel()


def test_a_plan_costs_whole_what_the_converted_model_does(run, checkpoints, text):
    made = make_measured_plan(run, replace(OPTIONS, measure=1))
    measured = made.plan.measured
    change, kl, tokens = converted_cost(made.plan, checkpoints("llama"), text)
    assert measured.delta_loss == pytest.approx(change, rel=1e-3, abs=1e-7)
    assert measured.kl == pytest.approx(kl, rel=1e-3)
    assert measured.tokens == tokens
    assert measured.stderr > 0
    assert measured.kl_stderr > 0
    assert made.plan.assignment == make_plan(run, replace(OPTIONS, measure=0)).plan.assignment
    assert rows(run)["plan_id"].to_list() == [made.plan.plan_id]
    text_out = made.as_text()
    assert f"measured on {tokens} tokens: loss {measured.delta_loss:+.5f}" in text_out
    assert "plans measured whole: 1," in text_out


def test_what_was_measured_is_not_measured_again(run, monkeypatch):
    first = make_measured_plan(run, OPTIONS)
    assert not first.up_to_date
    read = make_measured_plan(run, OPTIONS)
    assert read.up_to_date
    assert read.plan == first.plan
    kept = rows(run)

    def never(*_, **__):
        raise AssertionError("the model is not needed")

    monkeypatch.setattr(measure, "load_profiled", never)
    plain = make_plan(run, replace(OPTIONS, measure=0))
    assert plain.plan.measured is None
    again = make_measured_plan(run, OPTIONS)
    assert not again.up_to_date
    assert again.plan == first.plan
    assert rows(run).equals(kept)


def test_a_kill_keeps_what_was_measured(run, monkeypatch):
    monkeypatch.setattr(measure, "_interval", lambda *_: 0.0)

    def interrupted(model, items, ids, plans):
        if len(plans) > 1:
            raise KeyboardInterrupt
        yield from measure.interventions(model, items, ids, plans)

    monkeypatch.setattr(measure, "interventions", measure.measure_interventions, raising=False)
    monkeypatch.setattr(measure, "measure_interventions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_measured_plan(run, OPTIONS)
    assert len(rows(run)) == 1
    assert not (run / "plan.json").exists()


def test_a_plan_is_refined_within_its_bound_whether_it_agrees_or_not(run, monkeypatch):
    agreed = make_measured_plan(run, replace(OPTIONS, measure=3)).plan
    assert any("refined" in note for note in agreed.notes)
    monkeypatch.setattr(measure, "_interval", lambda *_: 0.0)
    first = make_measured_plan(run, replace(OPTIONS, measure=1)).plan
    assert any("they disagree" in note for note in first.notes)
    assert not any("refined" in note for note in first.notes)
    assert not first.measured.agrees
    refined = make_measured_plan(run, OPTIONS).plan
    assert 1 < len(rows(run)) <= OPTIONS.measure
    assert refined.measured.kl <= first.measured.kl
    mine = rows(run).filter(plan_id=refined.plan_id).row(0, named=True)
    assert mine["kl"] == refined.measured.kl
    assert any("refined" in note for note in refined.notes)
    for name, limit in refined.budget.items():
        assert getattr(refined.predicted, name) <= limit * (1 + 1e-9)
    rule = make_measured_plan(run, replace(PlanOptions(rule="fc2", formats=FORMATS), measure=5))
    assert rule.plan.made_by == "rule fc2"
    assert not any("refined" in note for note in rule.plan.notes)


def test_another_model_or_text_is_refused(checkpoints, text, tmp_path):
    model = shutil.copytree(checkpoints("llama"), tmp_path / "model")
    words = shutil.copytree(text, tmp_path / "text")
    run = profile(tmp_path / "run", model, words)
    (words / "0.txt").write_text("other words\n" * 50)
    with pytest.raises(DataError, match="has changed since the model was profiled on it"):
        make_measured_plan(run, OPTIONS)
    other = load_checkpoint(str(model)).model
    with torch.no_grad():
        other.get_input_embeddings().weight[0] += 1
    other.save_pretrained(model)
    with pytest.raises(PlanError, match="has changed since it was profiled"):
        make_measured_plan(run, OPTIONS)
    shutil.rmtree(model)
    with pytest.raises(CheckpointError, match="model"):
        make_measured_plan(run, OPTIONS)
    assert not (run / "plan.json").exists()
    assert not (run / "measured.parquet").exists()


def test_without_estimates_there_is_nothing_to_compare_with(checkpoints, text, tmp_path):
    run = profile(tmp_path / "run", checkpoints("llama"), text, sensitivity=False)
    result = CliRunner().invoke(
        main, ["plan", str(run), "--formats", ",".join(FORMATS), "--measure"]
    )
    assert result.exit_code == 2
    assert "no sensitivity.parquet" in result.output
