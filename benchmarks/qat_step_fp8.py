"""An experiment of qat_step.py: the forward products of W4A4 g128 on the fp8 units.

Integers of 4 bits are exact in e4m3, and so are sums of 128 of their products in the accumulators;
cuBLAS rescales the sum of each group by both scales in float32. `compare` sets time and error
beside those of bf16 products of the rounded operands. One pass writes integers, scales and the bf16
values, on which backward products would run as they do.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm
from triton.testing import do_bench

from bitplan.formats import parse_format
from bitplan.qat.fused import quantize_operand

FORMAT = parse_format("int4-g128")
GROUP = 128
TILE = 32
_ROUND: tl.constexpr = tl.constexpr(1.5 * 2**23)


@triton.jit
def split_groups(x, integers, scales, values, rows, PER_ROW: tl.constexpr, TILE: tl.constexpr):
    """Round finite groups of 128 to 4 bits: integers in e4m3, scales [PER_ROW, rows], values."""
    first = tl.program_id(0).to(tl.int64) * TILE
    group = first + tl.arange(0, TILE)
    place = first * 128 + (tl.arange(0, TILE) * 128)[:, None] + tl.arange(0, 128)[None, :]
    here = group < rows * PER_ROW
    value = tl.load(x + place, here[:, None], other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(value), 1) * 0.125
    scale = tl.where(scale == 0, 1.0, scale)
    inverse = tl.div_rn(1.0, scale)[:, None]
    quotient = value * inverse
    quotient = tl.fma(tl.fma(quotient, -scale[:, None], value), inverse, quotient)
    quotient = tl.fma(tl.fma(quotient, -scale[:, None], value), inverse, quotient)
    rounded = tl.minimum((quotient + _ROUND) - _ROUND, 7.0)
    tl.store(integers + place, rounded.to(tl.float8e4nv), here[:, None])
    tl.store(values + place, (rounded * scale[:, None]).to(tl.bfloat16), here[:, None])
    tl.store(scales + group % PER_ROW * rows + group // PER_ROW, scale, here)


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers [rows, in], scales [in / 128, rows] and bf16 values [rows, in]."""
    rows, per_row = x.shape[0], x.shape[1] // GROUP
    integers = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    values = torch.empty_like(x, dtype=torch.bfloat16)
    scales = x.new_empty(per_row, rows, dtype=torch.float32)
    grid = (triton.cdiv(rows * per_row, TILE),)
    split_groups[grid](x, integers, scales, values, rows, PER_ROW=per_row, TILE=TILE)
    return integers, scales, values


def multiply(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """Return the product of integers under their scales, [rows, out], bf16."""
    recipe = ScalingType.BlockWise1x128
    return scaled_mm(x, weight.t(), x_scales.t(), recipe, weight_scales.t(), recipe)


def exact(integers: Tensor, scales: Tensor) -> Tensor:
    groups = integers.double().unflatten(-1, (-1, GROUP))
    return (groups * scales.t().double()[..., None]).flatten(-2)


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


def compare(tokens: int, wide: int, out: int) -> dict[str, Any]:
    """Compare both products for inputs [tokens, wide] and weights [out, wide]."""
    x = torch.randn(tokens, wide, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(out, wide, device="cuda", dtype=torch.bfloat16)
    (a, a_scales, a_values), (b, b_scales, b_values) = split(x), split(weight)
    assert torch.equal(a_values, quantize_operand(x, FORMAT))
    some = slice(4096)
    expected = exact(a[some], a_scales[:, some]) @ exact(b, b_scales).t()
    ways: dict[str, Callable[[], object]] = {
        "fp8_ms": lambda: multiply(a, a_scales, b, b_scales),
        "bf16_ms": lambda: a_values @ b_values.t(),
        "split_ms": lambda: split(x),
        "round_ms": lambda: quantize_operand(x, FORMAT),
    }
    return {
        "in": wide,
        "out": out,
        **{name: round(do_bench(way, 5, 30), 4) for name, way in ways.items()},
        "fp8_error": distance(multiply(a, a_scales, b, b_scales)[some], expected),
        "bf16_error": distance((a_values @ b_values.t())[some], expected),
        "rounding_of_output": distance(expected.bfloat16(), expected),
    }
