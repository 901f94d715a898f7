"""Conversion touches every planned site, nothing else, shares the weights, and has an inverse."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitplan.errors import PlanError, TrainingError
from bitplan.formats import Format, parse_format
from bitplan.probe.modules import find_linears
from bitplan.probe.recorder import Recorder
from bitplan.qat.convert import FakeQuantizedLinear, convert, restore
from bitplan.qat.recipe import Recipe, make_optimizer
from bitplan.quantize import quantize_dequantize
from bitplan.sites import PLANNED_ROLES, Site

FAMILIES = ["llama", "gpt2", "bert", "qwen3_moe"]
IDS = torch.arange(40).view(2, 20) + 60
W, A = parse_format("int4-g16"), parse_format("int8-g24")


def everything(model: nn.Module, weight: Format = W, inputs: Format = A) -> dict[Site, Format]:
    return {
        item.linear.site(operand): fmt
        for item in find_linears(model)
        if item.linear.role in PLANNED_ROLES
        for operand, fmt in (("weight", weight), ("input", inputs))
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def by_hand(model: nn.Module, formats: Mapping[Site, Format]) -> None:
    """Round the weights in place, and the inputs by plain hooks: what conversion stands for."""
    for item in find_linears(model):
        if (fmt := formats.get(item.linear.site("weight"))) is not None:
            rounded = quantize_dequantize(item.weight().detach().contiguous(), fmt)
            item.module.weight.data = rounded.T.contiguous() if item.transposed else rounded
        if (fmt := formats.get(item.linear.site("input"))) is not None:
            item.module.register_forward_pre_hook(
                lambda _, args, fmt=fmt: (quantize_dequantize(args[0], fmt), *args[1:])
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_converted_model_computes_what_rounding_by_hand_does(
    build: Callable[[str], Any], family: str
) -> None:
    model, other = build(family), build(family)
    if family == "qwen3_moe":
        from bitplan.probe.experts import unfuse_experts

        assert unfuse_experts(model) == unfuse_experts(other) == 2
    formats = everything(model)
    before = logits(model)
    report = convert(model, formats)
    by_hand(other, formats)
    assert dict(report.converted) == formats
    assert report.kept == ()
    found = logits(model)
    torch.testing.assert_close(found, logits(other), atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-4
    converted = [m for m in model.modules() if hasattr(m, "quantize_weight")]
    assert len(converted) == len(formats) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_is_the_inverse_and_names_stay(build: Callable[[str], Any], family: str) -> None:
    model = build(family)
    before, names = logits(model), [(m.linear, m.transposed) for m in find_linears(model)]
    parameters = dict(model.named_parameters())
    formats = {
        site: fmt
        for site, fmt in everything(model).items()
        if type(model.get_submodule(site.module)) is not nn.Embedding
    }
    convert(model, formats)
    assert [(m.linear, m.transposed) for m in find_linears(model)] == names
    assert all(new is parameters[name] for name, new in model.named_parameters())
    restore(model)
    assert torch.equal(logits(model), before)
    assert not [m for m in model.modules() if "FakeQuantized" in type(m).__name__]
    assert all(new is parameters[name] for name, new in model.named_parameters())


def test_experts_are_converted_one_by_one(build: Callable[[str], Any]) -> None:
    from bitplan.probe.experts import unfuse_experts

    model = build("qwen3_moe")
    unfuse_experts(model)
    site = next(s for s in everything(model) if "experts.2" in s.module and s.operand == "weight")
    convert(model, {site: W})
    assert isinstance(model.get_submodule(site.module), FakeQuantizedLinear)
    others = [m for m in model.modules() if isinstance(m, FakeQuantizedLinear)]
    assert len(others) == 1


def test_a_tied_embedding_stays_as_it_is(build: Callable[[str], Any]) -> None:
    model = build("llama")
    head = Site("lm_head", "weight")
    report = convert(model, {head: W})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.model.embed_tokens) is nn.Embedding
    hidden = torch.randn(3, 32, generator=torch.manual_seed(0))
    expected = hidden @ quantize_dequantize(model.lm_head.weight.detach(), W).T
    torch.testing.assert_close(model.lm_head(hidden), expected)
    assert dict(report.converted) == {head: W}


def test_a_tied_weight_gets_the_gradients_of_both_its_uses(build: Callable[[str], Any]) -> None:
    model, apart = build("llama"), build("llama")
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight.detach().clone())
    for each in (model, apart):
        convert(each, {Site("lm_head", "weight"): W})
        each(input_ids=IDS, labels=IDS).loss.backward()
    uses = apart.lm_head.weight.grad + apart.model.embed_tokens.weight.grad
    torch.testing.assert_close(model.lm_head.weight.grad, uses)


def test_a_block_that_runs_twice_is_two_blocks_of_one_weight(build: Callable[[str], Any]) -> None:
    model, apart = build("llama"), build("llama")
    model.model.layers[1] = model.model.layers[0]
    apart.load_state_dict(model.state_dict())
    seen = []
    for each in (model, apart):
        formats = everything(each)
        convert(each, formats, {site: "lac" for site in formats if site.operand == "input"})
        with Recorder(each, formats=()) as recorder:
            loss = each.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            recorder.step()
        inputs = recorder.frame().filter(pl.col("site").str.ends_with("down_proj:input"))
        seen.append((loss, inputs["count"].sum(), inputs["absmax"].max(), len(inputs)))
    (loss, count, largest, once), (expected, other_count, other_largest, twice) = seen
    assert torch.equal(loss, expected)
    assert (once, twice) == (1, 2)
    assert (count, largest) == (other_count, other_largest)
    block, others = model.model.layers[0].named_parameters(), apart.model.layers
    for name, parameter in block:
        first, second = (other.get_parameter(name).grad for other in others)
        torch.testing.assert_close(parameter.grad, first + second)


@pytest.mark.parametrize("quantizer", ["absmax", "lwc", "lsq"])
def test_frozen_weights_are_rounded_and_stay(build: Callable[[str], Any], quantizer: str) -> None:
    model, free = build("llama"), build("llama")
    frozen = [name for name, _ in model.named_parameters() if "layers.0" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: model.get_parameter(name).clone() for name in frozen}
    formats = everything(model)
    named = {site: quantizer for site in formats if site.operand == "weight"}
    losses = []
    for each in (model, free):
        convert(each, formats, named)
        losses.append(each(input_ids=IDS, labels=IDS).loss)
    assert torch.equal(*losses)
    losses[0].backward()
    make_optimizer(model, Recipe(steps=1, batch_size=1, seq_len=8, lr=1e-2)).step()
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in frozen)
    assert not torch.equal(model.lm_head.weight, free.lm_head.weight)
    factor = model.model.layers[0].mlp.down_proj._parameters.get("weight_factor")
    assert (factor is None) == (quantizer == "absmax")
    # A frozen weight keeps its values; how it is rounded is still trained.
    assert factor is None or not torch.equal(factor, torch.ones_like(factor))


def test_frozen_tied_and_shared_weights_train_under_ddp(
    build: Callable[[str], Any], tmp_path: Path
) -> None:
    plain, wrapped = build("llama"), build("llama")
    for model in (plain, wrapped):
        model.model.layers[1] = model.model.layers[0]
        model.model.layers[0].mlp.requires_grad_(False)
        formats = everything(model) | {Site("lm_head", "weight"): W}
        convert(model, formats, {s: "lac" for s in formats if s.operand == "input"})
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(wrapped)
        for _ in range(2):  # DDP finds what had no gradient as the second pass begins
            for model in (plain, parallel):
                model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    finally:
        dist.destroy_process_group()
    found = dict(wrapped.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name].grad, parameter.grad)
        else:
            assert found[name].grad is None


def test_a_model_all_frozen_is_refused(build: Callable[[str], Any]) -> None:
    model = build("llama").requires_grad_(False)
    with pytest.raises(TrainingError, match="every parameter is frozen"):
        make_optimizer(model, Recipe(steps=1, batch_size=1, seq_len=8, lr=1e-2))


def test_bf16_sites_are_kept_and_the_unplanned_ones_are_listed(build: Callable[[str], Any]) -> None:
    model = build("llama")
    q, k = (Site(f"model.layers.0.self_attn.{n}_proj", "weight") for n in "qk")
    report = convert(model, {q: parse_format("bf16"), k: W})
    assert dict(report.converted) == {k: W}
    assert report.kept == (q,)
    assert Site("lm_head", "weight") in report.unplanned
    assert Site("model.embed_tokens", "weight") in report.unplanned
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    num_sites = sum(1 + item.has_input for item in find_linears(model))
    assert len(report.converted) + len(report.kept) + len(report.unplanned) == num_sites


def test_gradients_reach_the_weights_as_if_nothing_were_rounded(
    build: Callable[[str], Any],
) -> None:
    model = build("llama")
    linear = model.model.layers[0].mlp.down_proj
    convert(model, everything(model))
    new = model.model.layers[0].mlp.down_proj
    assert new.weight is linear.weight
    x = torch.randn(5, 40, generator=torch.manual_seed(0), requires_grad=True)
    new(x).sum().backward()
    ones = torch.ones(5, 32)
    torch.testing.assert_close(new.weight.grad, ones.T @ quantize_dequantize(x.detach(), A))
    torch.testing.assert_close(x.grad, ones @ quantize_dequantize(new.weight.detach(), W))


def test_sites_the_model_lacks_are_named_and_nothing_changes(build: Callable[[str], Any]) -> None:
    model = build("llama")
    formats = everything(model) | {Site("model.layers.7.mlp.up_proj", "weight"): W}
    with pytest.raises(PlanError, match=r"model\.layers\.7\.mlp\.up_proj:weight"):
        convert(model, formats)
    assert not [m for m in model.modules() if isinstance(m, FakeQuantizedLinear)]


def test_what_cannot_be_quantized_is_refused(build: Callable[[str], Any]) -> None:
    model = build("llama")
    with pytest.raises(PlanError, match=r"Embedding modules cannot .*--pin 'model\.embed_tok"):
        convert(model, {Site("model.embed_tokens", "weight"): W})
    with pytest.raises(PlanError, match="not one for inputs"):
        convert(model, {Site("lm_head", "input"): parse_format("int8-channel")})

    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model.model.layers[0].self_attn.o_proj = Odd(32, 32, bias=False)
    with pytest.raises(PlanError, match="Odd modules cannot be quantized"):
        convert(model, everything(model))
    assert not [m for m in model.modules() if isinstance(m, FakeQuantizedLinear)]


def test_a_module_with_two_names_is_swapped_under_both() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    convert(model, {Site("a.0", "weight"): W})
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], FakeQuantizedLinear)


def test_converting_twice_takes_the_second_plan(build: Callable[[str], Any]) -> None:
    model, once = build("llama"), build("llama")
    formats = everything(model)
    convert(model, everything(model, parse_format("int2-g16"), parse_format("int2-g16")))
    convert(model, formats)
    convert(once, formats)
    assert torch.equal(logits(model), logits(once))


def test_trained_scales_are_parameters_of_their_linears_until_restored(
    build: Callable[[str], Any],
) -> None:
    model = build("llama")
    formats = everything(model)
    names = {
        site: "lac" if site.operand == "input" else "lwc"
        for site in formats
        if "down_proj" in site.module or "q_proj" in site.module
    }
    for site in formats:  # what reads one tensor shares one factor
        if site.operand == "input" and site.module.endswith(("k_proj", "v_proj")):
            names[site] = "lac"
    before, plain = logits(model), dict(model.named_parameters())
    convert(model, formats, names)
    found = dict(model.named_parameters())
    added = found.keys() - plain.keys()
    assert {name.rpartition(".")[2] for name in added} == {"input_factor", "weight_factor"}
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.input_factor is attention.v_proj.input_factor
    assert not hasattr(attention.v_proj, "weight_factor")
    (model(input_ids=torch.arange(20)[None] + 60).logits.square().mean()).backward()
    moved = [name for name in added if found[name].grad.abs().sum() > 0]
    assert len(moved) == len(added)
    groups = make_optimizer(model, Recipe(steps=1, batch_size=1, seq_len=8, lr=1e-4)).param_groups
    of_factors = [g for g in groups if g["peak_lr"] == 1e-2]
    assert sum(len(g["params"]) for g in of_factors) == len(added)
    assert of_factors[0]["weight_decay"] == 0
    restore(model)
    assert dict(model.named_parameters()).keys() == plain.keys()
    assert torch.equal(logits(model), before)


def test_a_quantizer_that_does_not_fit_is_refused_before_anything_changes(
    build: Callable[[str], Any],
) -> None:
    model = build("llama")
    formats = everything(model)
    weight = next(site for site in formats if site.operand == "weight")
    with pytest.raises(PlanError, match="not one for weights"):
        convert(model, formats, {weight: "lac"})
    with pytest.raises(PlanError, match="trains the scales of integers"):
        convert(model, everything(model, parse_format("nvfp4")), {weight: "lsq"})
    assert not any(isinstance(m, FakeQuantizedLinear) for m in model.modules())
