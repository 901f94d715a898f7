"""llama.cpp b11434: names and blocks as gguf has them, types as `llama-quantize` wrote them."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bitplan.formats import parse_format
from bitplan.planner.export_llamacpp import tensor
from bitplan.planner.layers import Layer
from bitplan.planner.targets import TARGETS

BUILT = Path(__file__).parents[2] / ".venv-exports" / "llama-quantize"
QUANTIZE = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize") or str(BUILT)
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NEOX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
LLAMA = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
)


def types(place: Path) -> list[tuple[str, str]]:
    lines = (place / "tensor_types.txt").read_text().splitlines()
    return [(name, kind) for name, _, kind in (line.partition("=") for line in lines)]


@pytest.mark.parametrize(
    ("arch", "prefix", "names", "outside"),
    [
        ("LLAMA", "model.layers.{}.", LLAMA, ("lm_head", "model.embed_tokens")),
        ("QWEN3", "model.layers.{}.", LLAMA, ("lm_head", "model.embed_tokens")),
        ("PHI3", "model.layers.{}.", PHI3, ("lm_head", "model.embed_tokens")),
        ("GPT2", "transformer.h.{}.", GPT2, ("lm_head", "transformer.wte")),
        ("GPTNEOX", "gpt_neox.layers.{}.", NEOX, ("embed_out", "gpt_neox.embed_in")),
    ],
)
def test_names_are_those_of_gguf(
    arch: str, prefix: str, names: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 12)
    modules = [prefix.format(block) + name for block in (0, 11) for name in names]
    for module in (*modules, *outside):
        assert tensor(module) == f"{known.get_name(module)}.weight"


def test_types_have_the_blocks_and_bits_of_the_formats() -> None:
    for scheme in TARGETS["llama.cpp"].schemes:
        fmt = parse_format(scheme.weight)
        size, length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[scheme.storage.upper()]]
        assert size == fmt.group_size
        assert 8 * length / size == fmt.effective_bits(size)


def test_every_tensor_is_named_once_and_as_planned(every_pair: Any, exported: Any) -> None:
    layers = every_pair("llama.cpp")
    rows = types(exported("llama.cpp", layers))
    expected = {tensor(x.module): kind(x) for x in layers}
    for name, wanted in expected.items():
        assert [k for pattern, k in rows if re.search(pattern, name)] == [wanted]
    norms = ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"]
    assert not [name for name in norms for pattern, _ in rows if re.search(pattern, name)]


@pytest.mark.skipif(
    not os.access(QUANTIZE, os.X_OK), reason="there is no llama-quantize: make llama-quantize"
)
def test_llama_quantize_writes_the_planned_types(
    every_pair: Any, exported: Any, tmp_path: Path
) -> None:
    layers = every_pair("llama.cpp")
    place = exported("llama.cpp", layers)
    write_model(tmp_path / "model.gguf", layers)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-quantize").symlink_to(Path(QUANTIZE).resolve())
    subprocess.run(
        ["sh", place / "use.sh", tmp_path / "model.gguf", tmp_path / "out.gguf"],
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )
    found = {
        t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors
    }
    norms = {name for name in found if "norm" in name}
    assert {name: found[name] for name in found.keys() - norms} == {
        tensor(x.module): kind(x) for x in layers
    }


def kind(layer: Layer) -> str:
    """Name the type of a format, once more by hand."""
    named = {"int4-g32": "q4_0", "int5-g32": "q5_0", "int8-g32": "q8_0"}
    return named.get(str(layer.weight), str(layer.weight))


def write_model(path: Path, layers: list[Layer]) -> None:
    """Write a GGUF file in bf16 with the linears of a tiny Llama and its norms."""
    by_name = {tensor(x.module): x for x in layers}
    blocks = sum("ffn_down" in name for name in by_name)
    width = by_name["blk.0.attn_q.weight"].in_features
    inner = by_name["blk.0.ffn_down.weight"].in_features
    vocab = 256
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    rows = {"attn_k": width // 2, "attn_v": width // 2, "ffn_gate": inner, "ffn_up": inner}
    rng = np.random.default_rng(0)
    bf16 = gguf.GGMLQuantizationType.BF16
    for name, layer in by_name.items():
        part = name.split(".")[-2]
        height = vocab if part in ("output", "token_embd") else rows.get(part, width)
        values = rng.normal(size=(height, layer.in_features)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, bf16), raw_dtype=bf16)
    norms = [f"blk.{b}.{part}_norm.weight" for b in range(blocks) for part in ("attn", "ffn")]
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor(name, np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
