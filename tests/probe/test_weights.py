import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bitplan.errors import CheckpointError
from bitplan.formats import parse_formats
from bitplan.probe import weights
from bitplan.probe.modules import find_linears
from bitplan.probe.tensor_stats import stats
from bitplan.probe.weights import (
    WeightRecord,
    gate_up_alignment,
    open_weights,
    profile_weights,
)
from bitplan.tables import ERRORS, PROFILE

FORMATS = parse_formats(["int4-g32", "int8-channel"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(path: Path, tensors: Mapping[str, Tensor]) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def records(source: Path | str) -> dict[str, WeightRecord]:
    return {r.linear.module: r for r in profile_weights(str(source), FORMATS)}


def llama_block(seed: int = 0) -> dict[str, Tensor]:
    shapes = {
        "self_attn.q_proj": (16, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (40, 16),
        "mlp.up_proj": (40, 16),
        "mlp.down_proj": (16, 40),
    }
    prefix = "model.layers.0."
    matrices = {
        f"{prefix}{name}.weight": randn(*shape, seed=seed + i)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return matrices | {f"{prefix}input_layernorm.weight": torch.ones(16)}


def test_a_bare_file(tmp_path: Path) -> None:
    tensors = llama_block()
    source = save(tmp_path / "any-name.safetensors", tensors)
    files = open_weights(source)
    assert files.skipped == ("model.layers.0.input_layernorm.weight",)
    assert files.num_parameters == sum(t.numel() for t in tensors.values())
    found = records(source)
    assert {name: r.linear.role for name, r in found.items()} == {
        "model.layers.0.self_attn.q_proj": "qkv",
        "model.layers.0.self_attn.o_proj": "o",
        "model.layers.0.mlp.gate_proj": "fc1",
        "model.layers.0.mlp.up_proj": "fc1",
        "model.layers.0.mlp.down_proj": "fc2",
    }
    for name, record in found.items():
        want = stats(tensors[f"{name}.weight"], FORMATS)
        errors = {row["format"]: row["relative_error"] for row in record.errors}
        assert errors == {str(fmt): want.pop(str(fmt)) for fmt in FORMATS}
        assert record.row.items() >= want.items()
        assert record.row["site"] == f"{name}:weight"
        assert (record.row["step"], record.row["block"]) == (0, 0)
    assert PROFILE.frame(r.row for r in found.values()).height == 5
    assert ERRORS.frame(row for r in found.values() for row in r.errors)["site"].n_unique() == 5


def shard(directory: Path, *, index: str | None = "model.safetensors.index.json") -> Path:
    directory.mkdir(exist_ok=True)
    items = list(llama_block().items())
    parts = [dict(items[:3]), dict(items[3:])]
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        save(directory / name, part)
    if index is not None:
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


@pytest.mark.parametrize("index", ["model.safetensors.index.json", None])
def test_shards_give_what_one_file_gives(tmp_path: Path, index: str | None) -> None:
    found = records(shard(tmp_path / "shards", index=index))
    whole = records(save(tmp_path / "whole.safetensors", llama_block()))
    assert found.keys() == whole.keys()
    for name, record in whole.items():
        assert found[name].row == record.row
        assert found[name].errors == record.errors


def test_gate_and_up_in_two_shards(tmp_path: Path) -> None:
    found = records(shard(tmp_path))
    block = llama_block()
    gate, up = (
        block[f"model.layers.0.mlp.{leaf}_proj.weight"].double().numpy() for leaf in ("gate", "up")
    )
    norms = np.linalg.norm(gate, axis=1) * np.linalg.norm(up, axis=1)
    cosines = np.abs((gate * up).sum(1) / norms)
    for leaf in ("gate", "up"):
        row = found[f"model.layers.0.mlp.{leaf}_proj"].row
        assert row["gate_up_correlation"] == pytest.approx(cosines.mean(), rel=1e-5)
        assert row["gate_up_correlation_max"] == pytest.approx(cosines.max(), rel=1e-5)
    assert found["model.layers.0.mlp.down_proj"].row.get("gate_up_correlation") is None


def test_gate_and_up_in_one_matrix() -> None:
    gate, up = randn(10, 8), randn(10, 8, seed=1)
    fused, apart = gate_up_alignment(torch.cat([gate, up])), gate_up_alignment(gate, up)
    assert fused == {name: pytest.approx(float(value)) for name, value in apart.items()}
    up[3] = -3 * gate[3]
    aligned = gate_up_alignment(gate, up)
    assert float(aligned["gate_up_correlation_max"]) == pytest.approx(1)
    assert float(aligned["gate_up_correlation"]) < 0.9


def saved(model: nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)  # type: ignore[operator]
    return directory


@pytest.mark.parametrize("config", [True, False])
def test_gpt2_s_transposed_matrices(tmp_path: Path, config: bool) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    )
    saved(model, tmp_path)
    if not config:
        (tmp_path / "config.json").unlink()
    found = records(tmp_path)
    items = {i.linear.module: i for i in find_linears(model)}
    assert found.keys() == items.keys() - {"lm_head"}  # tied, so not in the file
    for name, record in found.items():
        assert record.linear == items[name].linear
        want = stats(items[name].weight().detach(), FORMATS)
        assert record.row["kurtosis"] == pytest.approx(want["kurtosis"], rel=1e-9)
        assert record.errors[0]["relative_error"] == want["int4-g32"]


def test_llama_as_loaded_and_as_filed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    found = records(saved(model, tmp_path))
    assert [r.linear for r in sorted(found.values(), key=lambda r: r.linear.module)] == sorted(
        (item.linear for item in find_linears(model)), key=lambda linear: linear.module
    )
    assert open_weights(str(tmp_path)).architecture == "LlamaForCausalLM"


def test_experts_in_three_dimensions(tmp_path: Path) -> None:
    up, down = randn(3, 24, 8), randn(3, 8, 12)
    prefix = "model.layers.1.mlp.experts"
    source = save(
        tmp_path / "moe.safetensors",
        {
            f"{prefix}.gate_up_proj": up,
            f"{prefix}.down_proj": down,
            f"{prefix}.gate_up_proj_bias": randn(3, 24),
            "model.layers.1.mlp.gate.weight": randn(3, 8),
            "model.layers.1.conv1d.weight": randn(8, 1, 4),
        },
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    found = records(source)
    assert set(open_weights(source).skipped) == {
        f"{prefix}.gate_up_proj_bias",
        "model.layers.1.conv1d.weight",
    }
    assert found["model.layers.1.mlp.gate"].linear.role == "router"
    for i in range(3):
        for name, tensor, role in (("gate_up_proj", up, "fc1"), ("down_proj", down, "fc2")):
            record = found[f"{prefix}.{i}.{name}"]
            assert (record.linear.role, record.linear.expert) == (role, i)
            assert record.row["std"] == pytest.approx(tensor[i].std(correction=0).item(), rel=1e-5)
        row = found[f"{prefix}.{i}.gate_up_proj"].row
        for name, value in gate_up_alignment(up[i]).items():
            assert row[name] == pytest.approx(float(value))


def test_experts_stored_transposed(tmp_path: Path) -> None:
    source = save(
        tmp_path / "m.safetensors", {"model.layers.0.mlp.experts.down_proj": randn(2, 6, 4)}
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    (linear, _) = (r.linear for r in records(source).values())
    assert (linear.in_features, linear.out_features) == (6, 4)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = randn(12, 64).to(dtype)
    (record,) = records(
        save(tmp_path / "w.safetensors", {"layers.0.mlp.up_proj.weight": stored})
    ).values()
    assert record.row["kurtosis"] == stats(stored.float())["kurtosis"]


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("shape", [(1,), (200, 1), (2, 3)])
def test_fp8_with_scales_beside_it(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    stored, scale = randn(200, 300).to(torch.float8_e4m3fn), 1 + randn(*shape).abs()
    name = "model.layers.0.mlp.down_proj.weight"
    source = save(tmp_path / "w.safetensors", {name: stored, name + suffix: scale})
    want = stored.double().numpy().copy()
    for i, j in itertools.product(range(200), range(300)):
        at = {(1,): (0,), (200, 1): (i, 0), (2, 3): (i // 128, j // 128)}[shape]
        want[i, j] *= scale[at].item()
    (record,) = records(source).values()
    assert record.row["std"] == pytest.approx(want.std(), rel=1e-5)
    assert record.row["absmax"] == pytest.approx(np.abs(want).max(), rel=1e-6)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {name: randn(8, 8).to(torch.float8_e4m3fn), name + "_scale": randn(5, 7)}
    with pytest.raises(CheckpointError, match=r"scales of shape \(5, 7\)"):
        records(save(tmp_path / "w.safetensors", tensors))


def test_packed_integers_are_no_linears(tmp_path: Path) -> None:
    tensors = llama_block() | {
        "model.layers.0.mlp.gate_proj.qweight": torch.ones(4, 4, dtype=torch.int32)
    }
    source = save(tmp_path / "w.safetensors", tensors)
    assert "model.layers.0.mlp.gate_proj.qweight" in open_weights(source).skipped


def test_weights_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    tensors = llama_block()
    weight = tensors["model.layers.0.mlp.down_proj.weight"]
    weight[0, :3] = math.nan
    weight[1, 1] = math.inf
    row = records(save(tmp_path / "w.safetensors", tensors))["model.layers.0.mlp.down_proj"].row
    assert (row["nan_count"], row["inf_count"], row["count"]) == (3, 1, weight.numel() - 4)
    want = weight[torch.isfinite(weight)].double().numpy()
    assert row["std"] == pytest.approx(want.std(), rel=1e-5)


def test_an_embedding_is_told_by_name(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": randn(20, 8),
        "transformer.wpe.weight": randn(9, 8),
        "lm_head.weight": randn(20, 8),
        "strange.weight": randn(4, 8),
    }
    found = records(save(tmp_path / "w.safetensors", tensors))
    assert [r.linear.role for _, r in sorted(found.items())] == [
        "lm_head",
        "embed",
        "other",
        "embed",
    ]


def test_tensors_are_read_when_their_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(self: weights._Reader, matrix: weights.Matrix) -> Tensor:
        read.append(matrix.tensor)
        return original(self, matrix)

    original = weights._Reader.read
    monkeypatch.setattr(weights._Reader, "read", counted)
    names = [f"layers.{i}.self_attn.o_proj.weight" for i in range(3)]
    source = save(tmp_path / "w.safetensors", {name: randn(4, 4) for name in names})
    for count, _ in enumerate(profile_weights(source), start=1):
        assert read == names[:count]


def test_matrices_side_by_side_give_what_one_after_the_other_gives(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.{name}": w for i in range(9) for name, w in block(i).items()}
    source = save(tmp_path / "w.safetensors", tensors)
    one = list(profile_weights(source, FORMATS))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = list(profile_weights(source, FORMATS))
        stopped = profile_weights(source, FORMATS)
        next(stopped)
        stopped.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert [record.linear for record in many] == [record.linear for record in one]
    assert [(r.row, r.errors) for r in many] == [(r.row, r.errors) for r in one]


def block(seed: int) -> dict[str, Tensor]:
    prefix = "model.layers.0."
    return {name.removeprefix(prefix): weight for name, weight in llama_block(seed).items()}


# --- bad input ---------------------------------------------------------------------------------


def refused(source: Path | str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        open_weights(str(source))
    assert "\n" not in str(info.value)


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file or directory")
    refused(tmp_path, "has no model.safetensors")


def test_a_truncated_file(tmp_path: Path) -> None:
    source = Path(save(tmp_path / "model.safetensors", llama_block()))
    whole = source.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        source.write_bytes(whole[:length])
        refused(source, "truncated")
        refused(tmp_path, "truncated")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no weights")
    refused(text, "no safetensors file")
    fake = tmp_path / "fake.safetensors"
    fake.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"x" * 40)
    refused(fake, "header is damaged")


@pytest.mark.parametrize("index", ["model.safetensors.index.json", None])
def test_a_missing_shard(tmp_path: Path, index: str | None) -> None:
    shard(tmp_path, index=index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, r"lacks model-00002|their names tell of 2")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x04boom")
    refused(tmp_path, "pickle")
    refused(path, "pickles are never opened")


def test_a_damaged_config(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", llama_block())
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "no JSON")


def test_no_matrix_at_all(tmp_path: Path) -> None:
    refused(save(tmp_path / "w.safetensors", {"norm.weight": torch.ones(4)}), "holds no matrix")
