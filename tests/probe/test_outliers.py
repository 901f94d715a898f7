"""What the pass over the calibration text finds, against the same found by plain hooks."""

from typing import Any

import polars as pl
import pytest
import torch

from bitplan.options import ProfileOptions
from bitplan.probe import inputs as module
from bitplan.probe.channels import ChannelStability
from bitplan.probe.inputs import Inputs, measure_inputs
from bitplan.probe.modules import find_linears
from bitplan.probe.outliers import unread_note
from bitplan.probe.profile import profile_checkpoint
from bitplan.tables import OUTLIERS

from .conftest import build_model
from .test_massive import naive

SEQUENCES, TOKENS = 3, 24
ROW, COLUMN = 3, 7


def planted(name: str = "llama", **changes: Any) -> Any:
    """A tiny model whose second block has a super weight."""
    model = build_model(name, seed=1, **changes)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[COLUMN] *= 300
        mlp.up_proj.weight[COLUMN] *= 300
        mlp.down_proj.weight[ROW, COLUMN] = 5.0
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))


def measure(model: Any, ids: torch.Tensor, *, sensitivity: bool = False) -> Inputs:
    return measure_inputs(
        model, find_linears(model), ids, (), has_loss=True, sensitivity=sensitivity
    )


def medians(found: Inputs) -> dict[str, float | None]:
    return {name: stats.row()["abs_p50"] for name, stats in found.stats.items()}


def observed(model: Any, ids: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """The outputs of some modules, by plain hooks."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: y, name + ":input": args[0]})
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("sensitivity", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_massive_activations_are_those_of_the_blocks_outputs(
    ids: torch.Tensor, size: int, sensitivity: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = planted()
    blocks = ["model.layers.0", "model.layers.1"]
    seen = observed(model, ids, blocks)
    monkeypatch.setattr(module, "batch_size", lambda *_: size)
    found = measure(model, ids, sensitivity=sensitivity)
    rows = [r for r in found.outliers.findings(medians(found)) if r["kind"] == "massive_activation"]
    want = {(name, c): one for name in blocks for c, one in naive(seen[name]).items()}
    assert {(row["module"], row["channel"]) for row in rows} == set(want)
    assert ("model.layers.1", ROW) in want
    for row in rows:
        expected = want[row["module"], row["channel"]]
        assert row["block"] == int(row["module"][-1])
        assert {name: row[name] for name in expected} == {
            name: pytest.approx(value, rel=1e-4) for name, value in expected.items()
        }
    assert found.outliers.unread == []


def test_the_super_weight_is_found_at_its_row_and_column(ids: torch.Tensor) -> None:
    model = planted()
    name = "model.layers.1.mlp.down_proj"
    seen = observed(model, ids, [name])
    x, y = seen[name + ":input"], seen[name]
    found = measure(model, ids)
    (row,) = [r for r in found.outliers.findings(medians(found)) if r["kind"] == "super_weight"]
    place = divmod(int(y.abs().amax(-1).argmax()), TOKENS)
    assert (row["module"], row["block"]) == (name, 1)
    assert (row["channel"], row["input_channel"]) == (ROW, COLUMN)
    assert (row["sequence"], row["position"]) == place
    assert row["weight"] == 5.0
    assert row["value"] == pytest.approx(y[place][ROW].item(), rel=1e-4)
    assert row["input_value"] == pytest.approx(x[place][COLUMN].item(), rel=1e-4)
    # Leaving the weight out takes away that share of the spike.
    without = float(y[place][ROW] - 5.0 * x[place][COLUMN])
    assert row["share"] == pytest.approx(1 - without / row["value"], rel=1e-3)


def test_an_ordinary_model_has_no_findings(ids: torch.Tensor) -> None:
    found = measure(build_model("llama"), ids)
    assert list(found.outliers.findings(medians(found))) == []


@pytest.mark.parametrize("size", [1, 2])
def test_channel_counts_are_those_of_the_inputs(
    ids: torch.Tensor, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama", initializer_range=0.2)
    names = [item.linear.module for item in find_linears(model) if item.has_input]
    seen = observed(model, ids, names)
    monkeypatch.setattr(module, "batch_size", lambda *_: size)
    counts = measure(model, ids).outliers.channels()
    assert set(counts) == set(names)
    for name in names:
        alone = ChannelStability(seen[name + ":input"].shape[-1])
        alone.update(seen[name + ":input"])
        assert torch.equal(counts[name], alone.counts())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_expert_counts_the_sequences_that_reached_it(ids: torch.Tensor, family: str) -> None:
    model = build_model(family)
    from bitplan.probe.experts import unfuse_experts

    unfuse_experts(model)
    found = measure(model, ids)
    counts = found.outliers.channels()
    routed = [name for name in found.stats if name.endswith("down_proj")]
    assert routed
    for name in routed:
        assert 1 <= counts[name][-1] <= SEQUENCES
        assert counts[name][:-1].max() <= counts[name][-1]
    assert counts["model.layers.0.self_attn.q_proj"][-1] == SEQUENCES


def test_hooks_are_gone_also_after_an_error(ids: torch.Tensor) -> None:
    model = planted()
    measure(model, ids)
    with pytest.raises(IndexError):
        measure(model, ids + 10**6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_whose_output_is_no_hidden_state_are_named(ids: torch.Tensor) -> None:
    model = planted()
    first = model.model.layers[0]
    forward = first.forward
    first.forward = lambda x, **k: forward(x, **k).unsqueeze(0)
    second = model.model.layers[1]
    later = second.forward
    second.forward = lambda x, **k: later(x[0], **k)
    found = measure(model, ids)
    (note,) = unread_note(found.outliers.unread)
    assert "after model.layers.0:" in note
    assert {r["block"] for r in found.outliers.findings(medians(found))} == {1}


@pytest.fixture(scope="module")
def profiled(tokenizer: Any, text_directory: Any, tmp_path_factory: Any) -> Any:
    directory = tmp_path_factory.mktemp("planted")
    planted().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    options = ProfileOptions(
        model=str(directory),
        data=(str(text_directory),),
        tokens=256,
        seq_len=32,
        formats=("int4-g16",),
        device="cpu",
    )
    return profile_checkpoint(tmp_path_factory.mktemp("runs") / "run", options), options


def test_the_table_has_its_columns_and_the_tokens_their_text(profiled: Any) -> None:
    result, _ = profiled
    frame = pl.read_parquet(result.run / "outliers.parquet")
    assert dict(frame.schema) == OUTLIERS.schema
    assert frame["kind"].unique().sort().to_list() == ["massive_activation", "super_weight"]
    assert frame["text"].null_count() == 0
    massive = frame.filter(kind="massive_activation")
    assert massive["tokens"].is_between(1, 256).all()
    assert massive["text"].str.len_chars().min() > 0
    assert "outliers.parquet" in result.files


def test_top_channels_have_their_stability(profiled: Any) -> None:
    result, _ = profiled
    inputs = result.profile.filter(pl.col("operand") == "input")
    for row in inputs.iter_rows(named=True):
        shares = [channel["stability"] for channel in row["top_channels"]]
        assert all(0 < share <= 1 for share in shares)
        assert row["top_channel_stability"] == pytest.approx(sum(shares) / len(shares))
    residual = inputs.filter(pl.col("role").is_in(["qkv", "fc1"]))
    assert residual["top_channel_overlap"].is_between(0, 1).all()
    others = inputs.join(residual, on="site", how="anti")
    assert others["top_channel_overlap"].null_count() == len(others)
    weights = result.profile.filter(pl.col("operand") == "weight")
    assert weights["top_channel_stability"].null_count() == len(weights)


def test_weights_alone_have_no_findings_and_drop_earlier_ones(profiled: Any, tmp_path: Any) -> None:
    from dataclasses import replace

    _, options = profiled
    profile_checkpoint(tmp_path, options)
    assert (tmp_path / "outliers.parquet").exists()
    profile_checkpoint(tmp_path, replace(options, weights_only=True))
    assert not (tmp_path / "outliers.parquet").exists()
