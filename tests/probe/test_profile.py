import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from bitplan.errors import CheckpointError, DataError, FormatError, RunError
from bitplan.formats import parse_format
from bitplan.options import ProfileOptions
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.modules import find_linears
from bitplan.probe.profile import profile_checkpoint
from bitplan.probe.text import load_text, tokenize
from bitplan.quantize import quantize_dequantize
from bitplan.rundir import RunDir
from bitplan.tables import ERRORS, PROFILE, SENSITIVITY

FILES = ("profile.parquet", "errors.parquet", "sensitivity.parquet")
FORMATS = ("int4-g16", "int8-g16")


@pytest.fixture(scope="module")
def options(save, text_directory):
    return ProfileOptions(
        model=str(save("llama", initializer_range=0.2)),
        data=(str(text_directory),),
        tokens=1024,
        seq_len=32,
        formats=FORMATS,
        device="cpu",
    )


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    profile_checkpoint(path, options)
    return path


@pytest.fixture(scope="module")
def observed(options):
    """The inputs of every linear, concatenated over all tokens, by plain hooks."""
    checkpoint = load_checkpoint(options.model)
    corpus = load_text(options.data)
    ids = tokenize(
        corpus, checkpoint.tokenizer, "calibration", tokens=1024, seq_len=32, seed=options.seed
    )
    inputs = {}
    for item in find_linears(checkpoint.model):

        def hook(_, args, name=item.linear.module):
            inputs[name] = args[0]

        item.module.register_forward_pre_hook(hook)
    with torch.no_grad():
        checkpoint.model(ids)
    return checkpoint, ids, inputs


def test_the_tables_have_their_columns_and_a_row_per_site(run):
    profile, errors, sensitivity = (pl.read_parquet(run / name) for name in FILES)
    assert dict(profile.schema) == PROFILE.schema
    assert dict(errors.schema) == ERRORS.schema
    assert dict(sensitivity.schema) == SENSITIVITY.schema
    assert profile["site"].is_unique().all()
    # 14 linears in blocks and the head have two sites each, the embedding one.
    assert len(profile) == 2 * 15 + 1
    assert len(errors) == len(FORMATS) * len(profile)
    assert len(sensitivity) == len(FORMATS) * 2 * 15
    assert (profile["step"] == 0).all()


@pytest.mark.parametrize("row", range(31))
def test_statistics_are_those_of_all_tokens(run, observed, row):
    checkpoint, _, inputs = observed
    found = pl.read_parquet(run / FILES[0]).row(row, named=True)
    (item,) = [i for i in find_linears(checkpoint.model) if i.linear.module == found["module"]]
    is_input = found["operand"] == "input"
    x = (inputs[found["module"]] if is_input else item.weight()).detach()
    values = x.double().numpy().ravel()
    assert found["count"] == values.size
    assert found["tokens"] == (1024 if is_input else None)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-3, abs=1e-6)
    assert found["std"] == pytest.approx(values.std(), rel=1e-3)
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(values, fisher=False), rel=1e-3)
    assert found["absmax"] == pytest.approx(np.abs(values).max(), rel=1e-6)
    assert found["abs_p50"] == pytest.approx(np.median(np.abs(values)), rel=1e-3)
    errors = pl.read_parquet(run / FILES[1]).filter(pl.col("site") == found["site"])
    for name in FORMATS:
        rounded = quantize_dequantize(x, parse_format(name)).double().numpy().ravel()
        expected = ((rounded - values) ** 2).sum() / (values**2).sum()
        (error,) = errors.filter(pl.col("format") == name).to_dicts()
        assert error["relative_error"] == pytest.approx(expected, rel=1e-3)
        assert error["sqnr_db"] == pytest.approx(-10 * math.log10(expected), abs=0.01)


def test_top_tokens_carry_position_and_text(run, observed):
    checkpoint, ids, inputs = observed
    for row in pl.read_parquet(run / FILES[0]).to_dicts():
        if row["operand"] == "weight":
            assert row["top_tokens"] is None
            continue
        largest = inputs[row["module"]].abs().amax(-1)
        top = row["top_tokens"][0]
        assert top["absmax"] == pytest.approx(largest.max().item())
        assert largest[top["sequence"], top["position"]].item() == top["absmax"]
        token = int(ids[top["sequence"], top["position"]])
        assert top["text"] == checkpoint.tokenizer.decode([token])


def test_linears_that_share_an_input_have_the_same_statistics(run):
    profile = pl.read_parquet(run / FILES[0]).filter(pl.col("operand") == "input")
    for _, group in profile.filter(pl.col("fused").is_not_null()).group_by("fused"):
        assert group["kurtosis"].n_unique() == 1
    sensitivity = pl.read_parquet(run / FILES[2]).filter(pl.col("site").str.ends_with(":input"))
    joined = sensitivity.join(profile, on="site").filter(pl.col("role") == "qkv")
    for _, group in joined.group_by("fused", "format"):
        assert len(group) == 3
        assert group["delta_loss"].n_unique() == 1


def test_gate_and_up_weights_have_a_correlation(run):
    profile = pl.read_parquet(run / FILES[0])
    has = profile.filter(pl.col("gate_up_correlation").is_not_null())
    assert set(has["role"]) == {"fc1"}
    assert len(has) == 4


def test_the_manifest_and_the_files_say_where_it_came_from(run, options):
    manifest = RunDir.open(run).manifest
    assert manifest["model"]["content_hash"] == load_checkpoint(options.model).content_hash
    assert manifest["data"]["content_hash"] == load_text(options.data).content_hash
    assert manifest["data"]["tokens"] == 1024
    assert manifest["seed"] == 0
    for name in FILES:
        note = json.loads(pl.read_parquet_metadata(run / name)["bitplan"])
        assert note["model"] == manifest["model"]
        assert note["data"] == manifest["data"]


def test_two_runs_are_the_same_bit_for_bit(run, options, tmp_path):
    profile_checkpoint(tmp_path / "again", options)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()


def test_the_seed_chooses_the_text(run, options, tmp_path):
    profile_checkpoint(tmp_path / "other", replace(options, seed=1))
    a, b = (pl.read_parquet(path / FILES[0]) for path in (run, tmp_path / "other"))
    same = a["kurtosis"] == b["kurtosis"]
    assert (same == (a["operand"] == "weight")).all()


def test_asked_again_it_is_up_to_date(options, tmp_path):
    model = shutil.copytree(options.model, tmp_path / "model")
    asked = replace(options, model=str(model), tokens=64)
    assert not profile_checkpoint(tmp_path / "run", asked).up_to_date
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    again = profile_checkpoint(tmp_path / "run", asked)
    assert again.up_to_date
    assert "up to date" in again.as_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Another model at the same place is another question.
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert not profile_checkpoint(tmp_path / "run", asked).up_to_date


def test_without_sensitivity_an_earlier_table_goes(options, tmp_path):
    profile_checkpoint(tmp_path, replace(options, tokens=64))
    result = profile_checkpoint(tmp_path, replace(options, tokens=64, sensitivity=False))
    assert result.sensitivity is None
    assert not (tmp_path / "sensitivity.parquet").exists()
    assert "delta loss" not in result.as_text()


def test_the_text_tells_roles_files_and_what_is_next(run, options):
    result = profile_checkpoint(run, options)
    text = result.as_text()
    for word in ("qkv", "fc2", "embed", "kurtosis", "int4-g16 error", "delta loss", *FILES):
        assert word in text
    assert text.splitlines()[-1] == f"next: bitplan plan {run}"
    assert all(len(line) < 120 for line in text.splitlines() if not line.startswith(("up", "next")))
    found = json.loads(json.dumps(result.as_json(), allow_nan=False))
    roles = {(row["role"], row["operand"]): row for row in found["roles"]}
    profile = pl.read_parquet(run / FILES[0])
    fc2 = profile.filter(pl.col("site").str.contains(r"down_proj:input"))
    row = roles["fc2", "input"]
    assert row["kurtosis_max"] == fc2["kurtosis"].max()
    assert row["worst_block"] == fc2.sort("kurtosis")["block"][-1]


def test_an_encoder_is_profiled_without_sensitivity(save, options, tmp_path):
    result = profile_checkpoint(tmp_path, replace(options, model=str(save("bert")), tokens=64))
    assert result.sensitivity is None
    assert any("predicts no next token" in note for note in result.notes)
    assert result.profile.filter(pl.col("role") == "fc2")["kurtosis"].null_count() == 0


def test_experts_that_got_no_token_are_null_and_not_zero(save, options, tmp_path):
    model = save("mixtral", num_local_experts=16, num_experts_per_tok=1, num_hidden_layers=1)
    result = profile_checkpoint(tmp_path, replace(options, model=str(model), tokens=4, seq_len=4))
    inputs = result.profile.filter(pl.col("operand") == "input", pl.col("expert").is_not_null())
    silent = inputs.filter(pl.col("count") == 0)
    assert len(inputs) == 32
    assert 24 <= len(silent) < 32
    for name in ("mean", "std", "kurtosis", "absmax", "abs_p50"):
        assert silent[name].null_count() == len(silent)
    assert not set(silent["site"]) & {*result.errors["site"], *result.sensitivity["site"]}
    assert result.profile.filter(pl.col("role") == "router")["count"].min() > 0
    assert any("were reached by no token" in note for note in result.notes)
    assert inputs["tokens"].sum() == 2 * 4


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "qwen3_moe", "opt"])
def test_other_families_go_through(save, options, tmp_path, family):
    asked = replace(options, model=str(save(family)), tokens=64)
    result = profile_checkpoint(tmp_path, asked)
    assert set(result.sensitivity["delta_loss"].is_finite()) == {True}
    assert result.profile["kurtosis"].null_count() == (
        result.profile.filter(pl.col("count") == 0).height
    )


def test_the_model_is_left_as_it_was(observed):
    """nnsight's wrappers come off again: the model can be exported and pickled."""
    from bitplan.probe.inputs import measure_inputs

    checkpoint, ids, _ = observed
    model = load_checkpoint(checkpoint.source).model
    items = find_linears(model)
    measure_inputs(model, items, ids[:1], (), has_loss=True, sensitivity=True)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(model(ids[:1]).logits, checkpoint.model(ids[:1]).logits)


def test_flags_of_the_command_line_are_hidden_from_nnsight(monkeypatch, build):
    from bitplan.probe.trace import traced

    seen = []
    for name in [name for name in sys.modules if name.split(".")[0] == "nnsight"]:
        monkeypatch.delitem(sys.modules, name)

    class Spy:
        def find_spec(self, name, *_):
            if name == "nnsight":
                seen.append(list(sys.argv))
                raise ImportError("far enough")

    monkeypatch.setattr(sys, "argv", ["bitplan", "-v", "-d"])
    monkeypatch.setattr(sys, "meta_path", [Spy(), *sys.meta_path])
    with pytest.raises(ImportError, match="far enough"), traced(build("llama"), []):
        pass
    assert seen == [["bitplan"]]
    assert sys.argv == ["bitplan", "-v", "-d"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "/nowhere/at/all"}, CheckpointError, "no such file"),
        ({"data": ("/nowhere",)}, DataError, "no such file"),
        ({"tokens": 10**7}, DataError, "tokens were asked"),
        ({"seq_len": 10**6}, DataError, "--seq-len"),
        ({"formats": ("int9-g1",)}, FormatError, "unknown format"),
    ],
)
def test_bad_input_leaves_nothing(options, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        profile_checkpoint(tmp_path / "run", replace(options, **change))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(save, options, tmp_path):
    model = save("llama", vocab_size=100, bos_token_id=1, eos_token_id=2)
    with pytest.raises(CheckpointError, match="do not belong together"):
        profile_checkpoint(tmp_path / "run", replace(options, model=str(model)))
    assert not (tmp_path / "run").exists()


def test_bad_input_leaves_what_was_there(options, tmp_path):
    profile_checkpoint(tmp_path, replace(options, tokens=64))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError):
        profile_checkpoint(tmp_path, replace(options, model="/nowhere/at/all"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_in_use_is_refused(options, tmp_path):
    with RunDir.create(tmp_path).lock(), pytest.raises(RunError, match="in use"):
        profile_checkpoint(tmp_path, options)


def test_weights_only_has_the_same_weights(run, options, tmp_path):
    result = profile_checkpoint(tmp_path, replace(options, weights_only=True))
    expected = pl.read_parquet(run / FILES[0]).filter(pl.col("operand") == "weight")
    found = result.profile.join(expected, on="site", suffix="_expected")
    assert len(found) == len(expected) == len(result.profile)
    for name in ("role", "block", "fused", "kurtosis", "absmax", "gate_up_correlation"):
        assert found[name].equals(found[f"{name}_expected"], null_equal=True, check_names=False)
    assert result.sensitivity is None
    assert result.files == FILES[:2]
    assert profile_checkpoint(tmp_path, replace(options, weights_only=True)).up_to_date
