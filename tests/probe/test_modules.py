from collections import Counter

import pytest
import torch
import transformers
from torch import nn

from bitplan.probe.experts import unfuse_experts
from bitplan.probe.modules import find_linears

SPLIT = {"qkv": 6, "o": 2, "fc1": 4, "fc2": 2, "embed": 1, "lm_head": 1}
JOINED = {"qkv": 2, "o": 2, "fc1": 2, "fc2": 2, "embed": 1, "lm_head": 1}
EXPERTS = {"qkv": 6, "o": 2, "fc1": 8, "fc2": 8, "embed": 1, "lm_head": 1, "router": 2}
ROLES = {
    "llama": SPLIT,
    "smollm": SPLIT,
    "mistral": SPLIT,
    "qwen2": SPLIT,
    "qwen3": SPLIT,
    "gemma3": SPLIT,
    "olmo2": SPLIT,
    "phi3": JOINED,
    "gpt2": JOINED | {"embed": 2},
    "gpt_neox": JOINED,
    "opt": SPLIT | {"fc1": 2, "embed": 2},
    "bert": SPLIT | {"fc1": 2, "embed": 3, "other": 1},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS,
}


@pytest.mark.parametrize("family", ROLES)
def test_every_matrix_of_a_family_has_its_role(build, family):
    model = build(family)
    unfuse_experts(model)
    items = find_linears(model)
    assert Counter(item.linear.role for item in items) == ROLES[family]
    assert {item.linear.block for item in items} == {0, 1, None}
    # None dropped: every parameter with two dimensions or more is the weight of some linear.
    matrices = {p.data_ptr() for p in model.parameters() if p.dim() >= 2}
    assert matrices == {item.weight().data_ptr() for item in items}
    assert all(item.linear.fused for item in items if item.linear.role in ("qkv", "fc1"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
def test_weight_is_out_by_in_and_multiplies_inputs(build, family):
    model = build(family)
    unfuse_experts(model)
    for item in find_linears(model):
        linear = item.linear
        assert item.weight().shape == (linear.out_features, linear.in_features)
        if item.has_input and linear.role != "router":
            x = torch.randn(3, linear.in_features)
            bias = getattr(item.module, "bias", None)
            expected = x @ item.weight().T + (0 if bias is None else bias)
            torch.testing.assert_close(item.module(x), expected)


def test_linears_that_share_an_input_are_fused(build):
    fused = Counter(item.linear.fused for item in find_linears(build("llama")))
    assert fused["model.layers.1.self_attn:qkv"] == 3
    assert fused["model.layers.1.mlp:fc1"] == 2
    assert fused[None] == 6  # o and fc2 of two blocks, the embedding and the head


def test_a_tied_head_is_one_tensor_under_two_names(build):
    by_role = {item.linear.role: item for item in find_linears(build("smollm"))}
    embed, head = by_role["embed"], by_role["lm_head"]
    assert embed.weight().data_ptr() == head.weight().data_ptr()
    assert head.has_input
    assert not embed.has_input


def test_a_subclass_of_linear_keeps_name_and_role(build):
    class Quantized(nn.Linear):
        pass

    model = build("llama")
    before = [item.linear for item in find_linears(model)]
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Quantized
    assert [item.linear for item in find_linears(model)] == before


class Unknown(nn.Module):
    """A made-up architecture that no row of the family table knows."""

    def __init__(self) -> None:
        super().__init__()
        block = {
            "attention": nn.ModuleDict({"wqkv": nn.Linear(8, 24), "wo": nn.Linear(8, 8)}),
            "ffn": nn.ModuleDict({"inner": nn.Linear(8, 32), "outer": nn.Linear(32, 8)}),
            "mystery": nn.Linear(8, 8),
        }
        self.tokens = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=1)
        self.config.model_type = "unheard-of"


def test_unknown_architectures_go_by_structure_and_the_rest_is_other():
    roles = {item.linear.module: item.linear.role for item in find_linears(Unknown())}
    assert roles == {
        "tokens": "embed",
        "blocks.0.attention.wqkv": "qkv",
        "blocks.0.attention.wo": "o",
        "blocks.0.ffn.inner": "fc1",
        "blocks.0.ffn.outer": "fc2",
        "blocks.0.mystery": "other",
    }


def test_a_module_without_a_config_is_fine():
    (item,) = find_linears(nn.Sequential(nn.Linear(2, 3)))
    assert (item.linear.in_features, item.linear.out_features) == (2, 3)


def test_a_vision_tower_takes_no_part_in_the_plan():
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    items = find_linears(transformers.AutoModelForCausalLM.from_config(config))
    vision = [item.linear for item in items if "vision" in item.linear.module]
    assert {linear.role for linear in vision} == {"other", "embed"}
    text = Counter(item.linear.role for item in items if "vision" not in item.linear.module)
    assert text == {"qkv": 3, "o": 1, "fc1": 2, "fc2": 1, "embed": 1, "lm_head": 1}
