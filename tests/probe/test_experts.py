import copy

import pytest
import torch

from bitplan.errors import CheckpointError
from bitplan.probe.experts import Expert, unfuse_experts
from bitplan.probe.modules import find_linears

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_experts_compute_the_same_logits(build, family):
    fused = build(family, initializer_range=0.2)
    unfused = copy.deepcopy(fused)
    assert unfuse_experts(unfused) == 2
    ids = torch.arange(48).view(2, 24) * 5 % 257
    with torch.no_grad():
        expected, found = fused(ids).logits, unfused(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_experts_have_the_same_gradients(build, family):
    fused = build(family, initializer_range=0.2)
    unfused = copy.deepcopy(fused)
    unfuse_experts(unfused)
    ids = torch.arange(24).view(1, 24)
    gradients = []
    for model in (fused, unfused):
        model(ids).logits.logsumexp(-1).sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_weights_are_views_of_the_fused_parameter(build):
    model = build("mixtral")
    fused = {
        f"model.layers.{block}.mlp.experts.{index}.{name}": parameter.data_ptr()
        + index * parameter[0].numel() * parameter.element_size()
        for block, layer in enumerate(model.model.layers)
        for name, parameter in layer.mlp.experts.named_parameters()
        for index in range(4)
    }
    unfuse_experts(model)
    experts = [item for item in find_linears(model) if item.linear.expert is not None]
    assert {item.linear.module: item.weight().data_ptr() for item in experts} == fused
    assert {item.linear.expert for item in experts} == {0, 1, 2, 3}


def test_experts_know_which_tokens_they_got(build):
    model = build("mixtral", initializer_range=0.2)
    unfuse_experts(model)
    with torch.no_grad():
        model(torch.arange(24).view(2, 12))
    experts = [module for module in model.modules() if isinstance(module, Expert)]
    routed = torch.cat([expert.tokens for expert in experts[:4]])
    assert torch.equal(routed.sort().values, torch.arange(24).repeat_interleave(2))


def test_experts_without_tokens_leave_the_output_alone(build):
    model = build("mixtral", num_local_experts=4, num_experts_per_tok=1)
    plain = copy.deepcopy(model)
    unfuse_experts(model)
    one = torch.tensor([[7]])
    with torch.no_grad():
        torch.testing.assert_close(model(one).logits, plain(one).logits)


def test_dense_models_are_left_alone(build):
    assert unfuse_experts(build("llama")) == 0


def test_experts_with_a_norm_of_their_own_are_refused(build):
    model = build("mixtral")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    with pytest.raises(CheckpointError, match="unsupported experts"):
        unfuse_experts(model)
