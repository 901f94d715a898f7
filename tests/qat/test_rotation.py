"""The rotation is scipy's Hadamard matrix, and leaves a linear that is not rounded as it is."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitplan.errors import PlanError
from bitplan.formats import parse_format
from bitplan.probe.modules import find_linears
from bitplan.qat.arms import EXTRA_ARMS
from bitplan.qat.convert import convert, restore
from bitplan.qat.recipe import Recipe, make_optimizer, sequence_losses
from bitplan.qat.rotation import block_size, rotate
from bitplan.qat.verify import verify_plan
from bitplan.quantize import quantize_dequantize
from bitplan.sites import Site

LOW = parse_format("int4-g16")


def matrix(width: int) -> Tensor:
    """H as a whole, [width, width], float64: blocks of scipy's on the diagonal."""
    size = 1
    while width % (2 * size) == 0:
        size *= 2
    block = torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5
    return torch.block_diag(*[block] * (width // size))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(0, 3), st.integers(0, 2))
def test_it_is_the_product_with_the_matrix_and_its_own_inverse(
    width: int, rows: int, dims: int
) -> None:
    x = random(*[rows] * dims, width, dtype=torch.float64)
    found = rotate(x)
    torch.testing.assert_close(found, x @ matrix(width))
    torch.testing.assert_close(rotate(found), x)
    torch.testing.assert_close(found.norm(), x.norm())


@pytest.mark.parametrize("width", [1024, 1536, 2048, 4096])
def test_wide_blocks_are_products_of_smaller_ones(width: int) -> None:
    x = random(3, width, dtype=torch.float64)
    torch.testing.assert_close(rotate(x), x @ matrix(width))


def test_autocast_does_not_narrow_it() -> None:
    x = random(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = rotate(x)
    assert torch.equal(found, rotate(x))


@pytest.mark.parametrize(
    ("width", "size"), [(1536, 512), (8960, 256), (11008, 256), (40, 8), (7, 1)]
)
def test_blocks_are_the_largest_powers_of_two(width: int, size: int) -> None:
    assert block_size(width) == size


def test_its_gradient_is_that_of_finite_differences() -> None:
    x = random(3, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rotate, (x,))
    strided = random(12, 3, dtype=torch.float64).t().requires_grad_()
    assert torch.autograd.gradcheck(rotate, (strided,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rotated_in_float32(dtype: torch.dtype) -> None:
    x = random(5, 64).to(dtype)
    torch.testing.assert_close(rotate(x), rotate(x.float()).to(dtype), atol=0, rtol=0)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("operands", [("weight", "input"), ("weight",), ("input",)])
def test_a_rotated_linear_rounds_the_rotated_operands(kind: Any, operands: tuple[str, ...]) -> None:
    linear = nn.Linear(40, 24) if kind is nn.Linear else Conv1D(24, 40)
    model = nn.ModuleDict({"fc": linear})
    weight = (linear.weight if kind is nn.Linear else linear.weight.t()).detach().clone()
    sites = [Site("fc", operand) for operand in operands]  # type: ignore[arg-type]
    convert(model, dict.fromkeys(sites, LOW), dict.fromkeys(sites, "hadamard"))
    x, h = random(6, 40).requires_grad_(), matrix(40).float()

    def rounded(value: Tensor, operand: str) -> Tensor:
        return quantize_dequantize(value, LOW) if operand in operands else value

    xh, wh = rounded(x.detach() @ h, "input"), rounded(weight @ h, "weight")
    out = model["fc"](x)
    torch.testing.assert_close(out, xh @ wh.T + linear.bias, atol=1e-5, rtol=1e-5)
    # Straight through the rounding, and back through the rotation.
    grad = random(6, 24, seed=1)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ wh @ h, atol=1e-5, rtol=1e-5)
    found = linear.weight.grad if kind is nn.Linear else linear.weight.grad.t()
    torch.testing.assert_close(found, grad.T @ xh @ h, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        first = model["fc"](x)
        linear.weight.mul_(2)
        assert not torch.equal(model["fc"](x), first)  # nothing stale


def test_with_bits_to_spare_it_changes_nothing(build: Callable[[str], Any]) -> None:
    model = build("llama")
    ids = torch.arange(60).view(3, 20)
    high = parse_format("int8-g1")
    sites = {
        item.linear.site(operand): high
        for item in find_linears(model)
        if item.linear.role == "fc2"
        for operand in ("weight", "input")
    }
    assert len(sites) == 4
    with torch.no_grad():
        plain = sequence_losses(model, ids)
        convert(model, sites, dict.fromkeys(sites, "hadamard"))
        rotated = sequence_losses(model, ids)
        restore(model)
        assert torch.equal(sequence_losses(model, ids), plain)
    assert not torch.equal(rotated, plain)
    torch.testing.assert_close(rotated, plain, atol=2e-3, rtol=0)


def test_an_outlier_channel_costs_less_rotated() -> None:
    x = random(32, 128)
    x[:, 5] *= 100
    fmt = parse_format("int4-g128")

    def error(value: Tensor) -> float:
        return float((quantize_dequantize(value, fmt) - value).square().sum())

    assert error(rotate(x)) < error(x) / 2


def test_it_trains_no_parameters_of_its_own(build: Callable[[str], Any]) -> None:
    model = build("gpt2")
    before = set(dict(model.named_parameters()))
    site = Site("transformer.h.0.mlp.c_proj", "weight")
    convert(model, {site: LOW}, {site: "hadamard"})
    assert set(dict(model.named_parameters())) == before
    sequence_losses(model, torch.arange(20).view(1, 20)).mean().backward()
    weight = model.transformer.h[0].mlp.c_proj.weight
    start = weight.detach().clone()
    make_optimizer(model, Recipe(steps=1, batch_size=1, seq_len=8, lr=1e-2)).step()
    assert not torch.equal(weight, start)


def test_an_odd_width_is_refused_before_anything_changes() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(33, 8)})
    site = Site("fc", "weight")
    with pytest.raises(PlanError, match=r"hadamard at fc: .* 33 is odd"):
        convert(model, {site: LOW}, {site: "hadamard"})
    assert type(model["fc"]) is nn.Linear


def test_verify_trains_the_rotated_arm_where_it_is_named(ready: Callable[..., Any]) -> None:
    (name,) = EXTRA_ARMS
    assert name == "w4a4-hadamard"
    at = ready(seeds=1, steps=2)
    plain = verify_plan(at.run, replace(at.options, arms=("bf16", "w4a4")))
    assert name not in {arm.name for arm in plain.arms}
    asked = replace(at.options, arms=("bf16", "w4a4", name))
    found = verify_plan(at.run, asked)
    assert [arm.name for arm in found.arms] == ["bf16", "w4a4", name]
    assert name in found.as_text()
    assert name not in found.missing
    records = {
        arm: json.loads((at.run / "arms" / arm / "seed-0" / "record.json").read_text())
        for arm in ("w4a4", name)
    }
    configs = {arm: record["config"] for arm, record in records.items()}
    assert configs[name]["formats"] == configs["w4a4"]["formats"]
    rotated = {f"model.layers.{i}.mlp.down_proj:{o}" for i in (0, 1) for o in ("weight", "input")}
    assert configs[name]["quantizers"] == dict.fromkeys(rotated, "hadamard")
    assert configs["w4a4"]["quantizers"] == {}
    assert records[name]["loss"] != records["w4a4"]["loss"]
