"""Which interventions a profile measures, what becomes of their rows, and what a kill leaves."""

import math
from dataclasses import replace

import polars as pl
import pytest

from bitplan.errors import BitplanError, CheckpointError
from bitplan.options import ProfileOptions
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.interventions import measure_interventions
from bitplan.probe.measured import to_measure, with_effects
from bitplan.probe.modules import find_linears
from bitplan.probe.profile import profile_checkpoint
from bitplan.probe.text import load_text, tokenize
from bitplan.rundir import RunDir
from bitplan.sites import PLANNED_ROLES
from bitplan.tables import PROFILE, SENSITIVITY

FORMATS = ("int4-g16", "int8-g16", "bf16")
UNITS = 2 * (7 + 4) + 2  # weights and inputs of two blocks, and the head


@pytest.fixture(scope="module")
def options(save, text_directory):
    return ProfileOptions(
        model=str(save("llama", initializer_range=0.2)),
        data=(str(text_directory),),
        tokens=256,
        seq_len=32,
        formats=FORMATS,
        device="cpu",
    )


@pytest.fixture
def run(options, tmp_path):
    profile_checkpoint(tmp_path / "run", options)
    return tmp_path / "run"


def tables(run):
    return pl.read_parquet(run / PROFILE.file), pl.read_parquet(run / SENSITIVITY.file)


def measured(run):
    return tables(run)[1].filter(method="intervention")


def test_the_least_certain_estimates_come_first_and_bf16_never(run):
    profile, sensitivity = tables(run)
    everything = to_measure(profile, sensitivity, "all")
    assert len(everything) == 2 * UNITS
    assert not any("bf16" in intervention.name for intervention in everything)
    columns = sensitivity.select("site", "format", "kl", "kl_stderr").rows()
    estimate = {(site, name): (kl, stderr) for site, name, kl, stderr in columns}
    totals = []
    for intervention in everything:
        rows = [estimate[str(site), fmt.name] for site, fmt in intervention.formats.items()]
        kl, stderr = map(sum, zip(*rows, strict=True))
        totals.append(math.hypot(0.2 * kl, stderr))
    assert totals == sorted(totals, reverse=True)
    role = dict(profile.select("site", "role").rows())
    planned = [i for i in everything if role[str(next(iter(i.formats)))] in PLANNED_ROLES]
    assert len(planned) == 2 * (UNITS - 2)
    assert to_measure(profile, sensitivity, 7) == planned[:7]
    assert to_measure(profile, sensitivity, 1000) == planned


def test_readers_of_an_input_are_measured_together_and_share_the_effect(run, options):
    profile, sensitivity = tables(run)
    name = "model.layers.0.self_attn:qkv:input=int4-g16"
    (qkv,) = [i for i in to_measure(profile, sensitivity, "all") if i.name == name]
    assert [site.module.rpartition(".")[2] for site in qkv.formats] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    checkpoint = load_checkpoint(options.model)
    ids = tokenize(
        load_text(options.data), checkpoint.tokenizer, "calibration", tokens=256, seq_len=32, seed=0
    )
    items = find_linears(checkpoint.model)
    ((effect,),) = measure_interventions(checkpoint.model, items, ids, [qkv])
    rows = with_effects(sensitivity, [effect]).filter(method="intervention")
    assert rows["site"].to_list() == [str(site) for site in qkv.formats]
    for column in ("delta_loss", "stderr", "kl", "kl_stderr", "last_layer_error"):
        assert rows[column].n_unique() == 1
        assert rows[column].sum() == pytest.approx(getattr(effect, column))


def test_a_profile_is_added_to_and_what_is_there_is_not_measured_again(run, options, capsys):
    before = tables(run)
    first = profile_checkpoint(run, replace(options, interventions=3))
    assert not first.up_to_date
    assert "were measured by intervention instead" in first.as_text()
    assert len({(r["site"], r["format"]) for r in measured(run).to_dicts()}) == len(measured(run))
    after = tables(run)
    assert after[0].equals(before[0])
    assert after[1].filter(method="gradient").equals(before[1])
    assert dict(after[1].schema) == SENSITIVITY.schema
    for count in (0, 2, 3):
        again = profile_checkpoint(run, replace(options, interventions=count))
        assert again.up_to_date
    more = profile_checkpoint(run, replace(options, interventions=5))
    assert not more.up_to_date
    rows = measured(run)
    assert rows.head(len(after[1]) - len(before[1])).equals(after[1].filter(method="intervention"))
    assert not to_measure(*tables(run), 5)
    assert RunDir.open(run).manifest["stages"]["profile"]["options"]["interventions"] == 5
    assert profile_checkpoint(run, options).up_to_date
    assert (
        rows.select("delta_loss", "stderr", "kl", "last_layer_error")
        .null_count()
        .sum_horizontal()
        .item()
        == 0
    )


def test_a_kill_loses_one_pass(run, options, monkeypatch):
    passes = []

    def interrupted(*args):
        for effects in measure_interventions(*args):
            if len(passes) == 2:
                raise KeyboardInterrupt
            passes.append(effects)
            yield effects

    monkeypatch.setattr("bitplan.probe.profile.measure_interventions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile_checkpoint(run, replace(options, interventions="all"))
    kept = measured(run)
    assert len(kept) == sum(len(e.intervention.formats) for effects in passes for e in effects) > 0
    assert len(to_measure(*tables(run), "all")) == 2 * UNITS - sum(map(len, passes))
    monkeypatch.undo()
    profile_checkpoint(run, replace(options, interventions="all"))
    assert measured(run).head(len(kept)).equals(kept)
    assert not to_measure(*tables(run), "all")


def test_what_has_no_estimates_or_no_loss_is_refused(options, save, tmp_path):
    for off in ({"sensitivity": False}, {"weights_only": True}):
        with pytest.raises(BitplanError, match="chosen by the estimates"):
            profile_checkpoint(tmp_path / "run", replace(options, interventions=1, **off))
    encoder = replace(options, model=str(save("bert")), interventions=1)
    with pytest.raises(CheckpointError, match="predicts no next token"):
        profile_checkpoint(tmp_path / "run", encoder)
    assert not (tmp_path / "run").exists()
