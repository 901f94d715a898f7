import hashlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitplan.errors import BitplanError, CheckpointError
from bitplan.probe.checkpoint import identify, load_checkpoint, resolve_device
from bitplan.probe.modules import find_linears


@pytest.fixture
def llama(save, tmp_path):
    """A directory of its own, to be damaged."""
    return shutil.copytree(save("llama"), tmp_path / "model")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_directory_loads_as_float32_in_eval_mode(llama, build, capfd):
    edit_weights(llama, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    checkpoint = load_checkpoint(str(llama), device="cpu")
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
    assert not checkpoint.model.training
    assert checkpoint.family == "llama"
    assert checkpoint.has_loss
    assert checkpoint.weights_note is None
    for name, expected in build("llama").state_dict().items():
        assert torch.equal(checkpoint.model.state_dict()[name], expected.bfloat16().float())
    assert checkpoint.tokenizer("a\n")["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_facts_count_parameters(llama):
    facts = load_checkpoint(str(llama)).facts()
    hidden, inner, vocabulary = 32, 48, 257
    block = hidden * (32 + 16 + 16 + 32) + 3 * hidden * inner + 2 * hidden
    assert facts["num_non_embedding_parameters"] == 2 * block + hidden
    assert facts["num_parameters"] == 2 * block + hidden + 2 * vocabulary * hidden
    assert facts["architecture"] == "LlamaForCausalLM"
    json.dumps(facts)


def test_loading_leaves_the_random_state_alone(llama):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_checkpoint(str(llama))
    assert torch.equal(torch.rand(1), expected)


def test_the_content_hash_is_of_weights_config_and_tokenizer(llama, tmp_path):
    checkpoint = load_checkpoint(str(llama))
    assert checkpoint.content_hash == identify(str(llama))
    assert len(checkpoint.content_hash) >= 16
    moved = shutil.copytree(llama, tmp_path / "elsewhere")
    (moved / "README.md").write_text("not part of it")
    assert identify(str(moved)) == checkpoint.content_hash
    hashes = {checkpoint.content_hash}
    for file in ("config.json", "tokenizer.json"):
        (moved / file).write_text((moved / file).read_text() + "\n")
        hashes.add(identify(str(moved)))
    edit_weights(moved, lambda t: t["lm_head.weight"].zero_())
    hashes.add(identify(str(moved)))
    assert len(hashes) == 4


def test_experts_come_out_apart(save):
    model = load_checkpoint(str(save("mixtral"))).model
    assert sum(item.linear.expert is not None for item in find_linears(model)) == 16


def test_an_encoder_loads_without_a_loss(save):
    checkpoint = load_checkpoint(str(save("bert")))
    assert not checkpoint.has_loss
    assert type(checkpoint.model).__name__ == "BertForMaskedLM"
    assert checkpoint.facts()["num_parameters"] > 0


def test_sharded_directories_load(build, tokenizer, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_checkpoint(str(tmp_path)).model
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))  # noqa: B905


# --- bad input: each is one clear error --------------------------------------------------------


def test_missing_paths(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load_checkpoint(str(tmp_path / "nowhere"))


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(str(tmp_path))


def test_a_bare_safetensors_file(llama):
    with pytest.raises(CheckpointError, match="--weights-only"):
        load_checkpoint(str(llama / "model.safetensors"))


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_safetensors(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_checkpoint(str(llama))


def test_damaged_safetensors_header(llama):
    path = llama / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] = ord("x")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="header is damaged"):
        load_checkpoint(str(llama))


def test_an_index_that_names_a_missing_shard(build, tokenizer, tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        load_checkpoint(str(tmp_path))


def test_a_damaged_index(llama):
    (llama / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(str(llama))


def test_pickled_weights_are_refused(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(CheckpointError, match=r"pickle only \(pytorch_model\.bin\)"):
        load_checkpoint(str(llama))


def test_missing_weights_are_named_and_never_made_up(llama):
    edit_weights(llama, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_checkpoint(str(llama))


def test_weights_of_another_shape(llama):
    edit_config(llama, intermediate_size=50)
    with pytest.raises(CheckpointError, match=r"shape|size"):
        load_checkpoint(str(llama))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(llama, bad):
    def damage(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, :2] = bad

    edit_weights(llama, damage)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight has 2 of 1536"):
        load_checkpoint(str(llama))


def test_no_tokenizer(llama):
    for path in llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_checkpoint(str(llama))


def test_unsupported_architectures(llama):
    edit_config(llama, model_type="made-up", architectures=["MadeUpForCausalLM"])
    with pytest.raises(CheckpointError, match="does not support this architecture"):
        load_checkpoint(str(llama))


def test_encoder_decoders(llama):
    edit_config(llama, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(CheckpointError, match="encoder-decoder"):
        load_checkpoint(str(llama))


def test_weights_that_are_quantized_already(llama):
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"already quantized \(gptq\)"):
        load_checkpoint(str(llama))


def test_code_of_the_checkpoint_does_not_run(llama):
    (llama / "modeling_evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    edit_config(llama, model_type="evil", auto_map={"AutoConfig": "modeling_evil.Evil"})
    with pytest.raises(CheckpointError):
        load_checkpoint(str(llama))


def test_messages_are_one_line(llama):
    edit_config(llama, model_type="made-up")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(llama))
    assert "\n" not in str(caught.value)


# --- GGUF --------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path, build, tokenizer):
    """A tiny Llama as GGUF: matrices in Q8_0, norms in float32."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    model = build("llama", intermediate_size=64)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    for name, tensor in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        values = tensor.numpy().astype(np.float32)
        if tensor.dim() < 2:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_loads_from_the_file_and_from_its_directory(gguf_file, build, capfd):
    expected = build("llama", intermediate_size=64).model.layers[1].mlp.down_proj.weight
    for source in (gguf_file, gguf_file.parent):
        checkpoint = load_checkpoint(str(source))
        found = checkpoint.model.model.layers[1].mlp.down_proj.weight
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
        assert checkpoint.weights_note == "weights were already rounded to 8 bits (GGUF Q8_0)"
        assert checkpoint.content_hash == identify(str(gguf_file))
    assert capfd.readouterr().out == ""


def test_a_gguf_header_is_parsed_once(gguf_file, monkeypatch):
    import gguf

    class Counted(gguf.GGUFReader):
        parsed = 0

        def __init__(self, *arguments):
            Counted.parsed += 1
            super().__init__(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    load_checkpoint(str(gguf_file), device="cpu")
    assert Counted.parsed == 1
    assert gguf.GGUFReader is Counted  # as it was before


def test_gguf_without_the_package_says_what_to_install(gguf_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'bitplan\[gguf\]'"):
        load_checkpoint(str(gguf_file))


@pytest.mark.parametrize("keep", [0, 10, 2000, -1000])
def test_a_truncated_gguf(gguf_file, keep):
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is truncated or no GGUF"):
        load_checkpoint(str(gguf_file))


def test_two_ggufs_in_a_directory(gguf_file):
    shutil.copy(gguf_file, gguf_file.with_name("other.gguf"))
    with pytest.raises(CheckpointError, match=r"2 GGUF files: name one of other\.gguf, tiny\.gguf"):
        load_checkpoint(str(gguf_file.parent))


# --- devices -----------------------------------------------------------------------------------


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    with pytest.raises(BitplanError, match="no device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(BitplanError, match="is not here"):
        resolve_device("cuda:99")


def test_hash_is_sha256_of_names_and_contents(llama):
    outer = hashlib.sha256()
    for path in sorted(llama.iterdir()):
        if path.suffix in {".json", ".txt", ".model", ".safetensors"}:
            outer.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    assert identify(str(llama)) == outer.hexdigest()[:32]
