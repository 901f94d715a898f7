"""A model in parts: what is in memory when, and which models are refused."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bitplan.errors import CheckpointError
from bitplan.probe.blocks import PartedModel
from bitplan.probe.checkpoint import load_checkpoint, open_in_parts

IDS = torch.arange(24).view(2, 12)


def storage_bytes(model):
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tensors(model)
    }
    return sum(storages.values())


def tensors(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("family", ["llama", "smollm", "gpt2", "opt", "mixtral", "gemma3"])
def test_its_own_forward_in_parts_is_the_model(save, family):
    path = str(save(family, num_hidden_layers=3))
    whole = load_checkpoint(path, device="cpu").model
    checkpoint, parted = open_in_parts(path, device="cpu")
    assert checkpoint.facts() == load_checkpoint(path, device="cpu").facts()
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
        with parted.mounted(parted.front):
            hidden, calls = parted.enter(IDS)
        assert len(calls) == len(parted.blocks) == 3
        for index, block in enumerate(parted.blocks):
            with parted.mounted([block]):
                hidden = parted.run_block(index, hidden, calls[index])
        with parted.mounted(parted.tail):
            assert torch.equal(parted.leave(IDS, hidden).logits, expected)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_only_the_mounted_part_is_in_memory(save, family):
    path = str(save(family, num_hidden_layers=4))
    whole = load_checkpoint(path, device="cpu").model
    _, parted = open_in_parts(path, device="cpu")
    hollow = storage_bytes(parted.model)
    assert hollow < storage_bytes(whole) / 20
    for names in (parted.front, parted.tail, *([block] for block in parted.blocks)):
        parts = [whole.get_submodule(name) for name in names]
        with parted.mounted(names):
            real = dict(parted.model.named_parameters())
            assert not any(parameter.requires_grad for parameter in real.values())
            for name, part in zip(names, parts, strict=True):
                for path_, parameter in part.named_parameters():
                    assert torch.equal(real[f"{name}.{path_}"], parameter)
            held = storage_bytes(parted.model) - hollow
            expected = sum(p.numel() * 4 for part in parts for p in part.parameters())
            assert abs(held - expected) < 4096, "more than the part, or less"
        assert storage_bytes(parted.model) == hollow


@pytest.mark.parametrize("family", ["llama", "smollm", "mixtral"])
def test_what_was_mounted_is_gone_at_once(save, family):
    """Without the garbage collector: models refer to themselves, blocks would pile up."""
    _, parted = open_in_parts(str(save(family)), device="cpu")
    seen = []
    gc.disable()
    try:
        for names in (parted.front, parted.tail, parted.blocks[:1]):
            with parted.mounted(names):
                real = [p for p in parted.model.parameters() if p.stride() != (0,) * p.dim()]
                seen += [weakref.ref(parameter) for parameter in real]
                del real
        assert seen
        assert not any(reference() is not None for reference in seen)
    finally:
        gc.enable()


def test_a_tied_head_is_read_from_the_embedding(save):
    path = str(save("smollm"))
    _, parted = open_in_parts(path, device="cpu")
    weight = load_checkpoint(path, device="cpu").model.lm_head.weight
    with parted.mounted(parted.tail):
        assert torch.equal(parted.model.lm_head.weight, weight)
        assert not parted.model.model.embed_tokens.weight.any()


def test_each_layer_keeps_its_own_mask_and_rotation(save):
    kinds = ["sliding_attention", "full_attention"]
    path = str(save("gemma3", num_hidden_layers=2, layer_types=kinds, sliding_window=4))
    _, parted = open_in_parts(path, device="cpu")
    with parted.mounted(parted.front):
        _, (sliding, full) = parted.enter(IDS)
        _, again = parted.enter(IDS)
    # Plain causality needs no mask, a window does.
    assert full.kwargs["attention_mask"] is None
    assert sliding.kwargs["attention_mask"].shape[-2:] == (12, 12)
    cosines = [call.kwargs["position_embeddings"][0] for call in (sliding, full)]
    assert not torch.equal(*cosines)
    assert again[0].kwargs["attention_mask"] is sliding.kwargs["attention_mask"]


def test_a_weight_that_is_not_finite_is_named(save, build, tokenizer, tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, parted = open_in_parts(str(tmp_path), device="cpu")
    with parted.mounted(parted.blocks[:1]):
        pass
    message = r"layers\.1\.mlp\.down_proj\.weight has 2 of 1536 weights NaN"
    with pytest.raises(CheckpointError, match=message), parted.mounted(parted.blocks[1:]):
        pass


# --- models that are made otherwise --------------------------------------------------------


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden, other=None):
        if self.kind == "two outputs":
            return {"hidden": hidden}
        return hidden + self.linear(hidden)


class Odd(nn.Module):
    """A model of two blocks that breaks one rule."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        text = SimpleNamespace(num_hidden_layers=2)
        self.config = SimpleNamespace(get_text_config=lambda: self.config, **vars(text))
        self.embed = nn.Embedding(16, 8)
        self.shared = nn.Linear(8, 8)
        blocks = [Block(kind) for _ in range(1 if kind == "no list" else 2)]
        self.layers = nn.ModuleList(blocks)

    def forward(self, input_ids):
        first = hidden = self.embed(input_ids)
        for block in self.layers:
            match self.kind:
                case "residual":
                    hidden = block(hidden, first)
                case "cache":
                    hidden = block(hidden, {})
                case "between":
                    hidden = block(self.shared(hidden))
                case "twice":
                    hidden = block(block(hidden))
                case "named":
                    hidden = block(hidden=hidden)
                case _:
                    hidden = block(hidden)
            if self.kind == "early exit":
                break
        return (hidden + first if self.kind == "looks back" else hidden,)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no list", "no list of 2 blocks"),
        ("residual", "more than one tensor that depends on it"),
        ("cache", "handed a dict"),
        ("between", "shared runs between its blocks"),
        ("twice", "do not run once each"),
        ("named", "not handed hidden states first"),
        ("two outputs", "return a dict"),
        ("early exit", "runs 1 of its 2 blocks"),
        ("looks back", "looks back"),
    ],
)
def test_a_model_that_is_made_otherwise_is_refused(kind, reason):
    def read(devices):
        with torch.device("meta"):
            return Odd(kind)

    with pytest.raises(CheckpointError, match=reason) as caught:
        PartedModel(read, "odd", torch.device("cpu"))
    assert "--weights-only" in str(caught.value)


def test_a_model_that_breaks_no_rule_is_taken():
    def read(devices):
        with torch.device("meta"):
            return Odd("none")

    parted = PartedModel(read, "odd", torch.device("cpu"))
    assert parted.blocks == ("layers.0", "layers.1")
    assert (parted.front, parted.tail, parted.idle) == (("embed",), (), ("shared",))
    assert parted.hidden_size == 8


def test_gguf_is_read_whole(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="without --stream"):
        open_in_parts(str(tmp_path / "model.gguf"), device="cpu")


def test_parts_of_a_sharded_checkpoint_and_names_that_begin_alike(build, tokenizer, tmp_path):
    model = build("llama", num_hidden_layers=11)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    _, parted = open_in_parts(str(tmp_path), device="cpu")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    with parted.mounted([parted.blocks[1]]):
        layers = parted.model.model.layers
        expected = whole.model.layers[1].mlp.up_proj.weight
        assert torch.equal(layers[1].mlp.up_proj.weight, expected)
        assert not layers[10].mlp.up_proj.weight.any()
