"""Models that run parts twice, never or on constants, and mixtures whose experts starve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from bitplan.formats import parse_formats
from bitplan.options import PlanOptions, ProfileOptions
from bitplan.planner.stage import make_plan
from bitplan.probe import inputs as module
from bitplan.probe.inputs import Inputs, measure_inputs
from bitplan.probe.modules import find_linears
from bitplan.probe.profile import profile_checkpoint
from bitplan.probe.recorder import Recorder
from bitplan.reports.report import write_report

from .conftest import build_model

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def options(text_directory: Path) -> ProfileOptions:
    return ProfileOptions(
        model="",
        data=(str(text_directory),),
        tokens=64,
        seq_len=16,
        formats=("int4-g16", "int8-g16"),
        device="cpu",
    )


def measure(model: Any, ids: torch.Tensor) -> Inputs:
    formats = parse_formats(("int4-g16",))
    return measure_inputs(model, find_linears(model), ids, formats, has_loss=True, sensitivity=True)


def test_linears_that_run_twice_have_the_statistics_of_their_first_run(ids: torch.Tensor) -> None:
    model = build_model("llama", initializer_range=0.2)
    once = measure(model, ids)
    model.model.layers[1] = model.model.layers[0]
    twice = measure(model, ids)
    assert not any("more than once" in note for note in once.notes)
    (note,) = twice.notes
    assert note.startswith("7 linears run more than once in a pass, model.layers.0.self_attn.q")
    assert twice.stats[DOWN].rows == ids.numel()
    assert twice.stats[DOWN].row() == once.stats[DOWN].row()
    assert torch.equal(twice.outliers.channels()[DOWN], once.outliers.channels()[DOWN])


def test_linears_that_never_run_have_no_statistics(ids: torch.Tensor) -> None:
    model = build_model("llama")
    model.config.num_hidden_layers = 1  # an early exit: the second block is there and not run
    found = measure(model, ids)
    assert DOWN in found.stats
    assert not any("layers.1" in name for name in found.stats)
    assert found.sensitivity is not None
    assert not any("layers.1" in row["site"] for row in found.sensitivity)
    assert not any("layers.1" in name for name in found.outliers.channels())


def test_a_last_batch_of_another_shape_changes_nothing(
    ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama", initializer_range=0.2)
    whole = measure(model, ids)
    monkeypatch.setattr(module, "batch_size", lambda *_: 2)
    parts = measure(model, ids)
    row, want = parts.stats[DOWN].row(), whole.stats[DOWN].row()
    assert row["count"] == want["count"]
    for name in ("mean", "std", "kurtosis", "absmax"):
        assert row[name] == pytest.approx(want[name], rel=1e-4)
    assert torch.equal(parts.outliers.channels()[DOWN], whole.outliers.channels()[DOWN])


def test_a_training_s_batches_may_change_shape() -> None:
    model = build_model("llama").train()
    with Recorder(model) as recorder:
        for shape in ((2, 8), (1, 5), (3, 1)):
            model(torch.zeros(shape, dtype=torch.long))
        recorder.step()
    rows = recorder.frame().filter(operand="input", module=DOWN)
    assert rows["tokens"].to_list() == [2 * 8 + 1 * 5 + 3 * 1]


def test_half_precision_that_overflows_is_counted_and_not_averaged() -> None:
    model = build_model("llama").train().half()
    with torch.no_grad():
        # Gate and up products of some tokens are beyond the 65,504 of float16.
        model.model.layers[0].mlp.up_proj.weight[3] = 3e4
        model.model.layers[0].mlp.gate_proj.weight[3] = 3e4
    with Recorder(model) as recorder, torch.no_grad():
        model(torch.arange(16)[None])
        recorder.step()
    frame = recorder.frame().filter(operand="input")
    (down,) = frame.filter(module=DOWN).to_dicts()
    assert down["inf_count"] > 0
    assert down["count"] + down["inf_count"] + down["nan_count"] == 16 * 48
    assert down["absmax"] <= 65504
    for name in ("mean", "std", "abs_p50"):
        assert down[name] is not None
    # What comes after it is NaN throughout: no statistic, and no zero either.
    (head,) = frame.filter(module="lm_head").to_dicts()
    assert head["nan_count"] > 0
    assert head["kurtosis"] is None or head["count"] > 0


def saved(model: Any, tokenizer: Any, directory: Path) -> str:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_constant_tensors_have_no_kurtosis_and_go_through_every_stage(
    tokenizer: Any, options: ProfileOptions, tmp_path: Path
) -> None:
    model = build_model("llama", initializer_range=0.2)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.zero_()  # and with it the input of its fc2
    run = tmp_path / "run"
    asked = replace(options, model=saved(model, tokenizer, tmp_path / "model"))
    result = profile_checkpoint(run, asked)
    constant = result.profile.filter(
        pl.col("site").is_in(
            [
                "model.layers.0.mlp.down_proj:weight",
                "model.layers.1.mlp.up_proj:weight",
                "model.layers.1.mlp.down_proj:input",
            ]
        )
    )
    assert constant["count"].min() > 0
    assert constant["std"].to_list() == [0.0] * 3
    assert constant["kurtosis"].to_list() == constant["skewness"].to_list() == [None] * 3
    assert constant["top_channel_stability"].null_count() == 3
    errors = result.errors.filter(pl.col("site").is_in(constant["site"].implode()))
    assert errors.height == 6
    assert errors["relative_error"].null_count() == 6
    assert "nan" not in result.as_text().lower()
    make_plan(run, PlanOptions(input_bits=5, formats=options.formats))
    write_report([run])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routing_is_told_and_starved_experts_are_named_as_such(
    family: str, tokenizer: Any, options: ProfileOptions, tmp_path: Path
) -> None:
    name = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}[family]
    model = build_model(family, initializer_range=0.2, **{name: 16})
    asked = replace(
        options, model=saved(model, tokenizer, tmp_path / "model"), tokens=16, seq_len=8
    )
    run = tmp_path / "run"
    result = profile_checkpoint(run, asked)
    inputs = result.profile.filter(pl.col("operand") == "input", pl.col("expert").is_not_null())
    silent = inputs.filter(pl.col("tokens") == 0)
    assert not silent.is_empty()
    for column in ("mean", "std", "kurtosis", "absmax", "top_channel_stability"):
        assert silent[column].null_count() == silent.height
    routed = result.as_json()["routing"]
    assert sum(row["tokens"] for row in routed) == 16 * 2 * 2  # two experts a token, two blocks
    none = sum(row["tokens"] == 0 for row in routed)
    assert none == silent.filter(role="fc2").height
    (line,) = [line for line in result.as_text().splitlines() if line.startswith("experts: ")]
    assert line.startswith(
        f"experts: {none} of 32 experts were never routed to and have no statistics; the busiest"
    )
    write_report([run])
    assert "Outlined cells are those never routed to." in (run / "report.html").read_text()
