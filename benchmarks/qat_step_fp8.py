"""An experiment of qat_step.py: the forward products of W4A4 g128 on the fp8 units.

Integers of 4 bits are exact in e4m3, and so are sums of 128 of their products in the accumulators;
cuBLAS rescales each sum of a group by both scales in float32. So the product is closer to that of
the rounded operands than bf16's, whose operands are rounded once more. One pass writes the
integers, their scales, and the bf16 values, on which the backward products run as they did.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

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


@torch.library.custom_op("bitplan_benchmark::split", mutates_args=())
def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers [rows, in], scales [in / 128, rows] and bf16 values [rows, in]."""
    x = x.contiguous()
    rows, per_row = x.shape[0], x.shape[1] // GROUP
    integers = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    values = torch.empty_like(x, dtype=torch.bfloat16)
    scales = x.new_empty(per_row, rows, dtype=torch.float32)
    grid = (triton.cdiv(rows * per_row, TILE),)
    split_groups[grid](x, integers, scales, values, rows, PER_ROW=per_row, TILE=TILE)
    return integers, scales, values


@split.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    return (
        x.new_empty(rows, width, dtype=torch.float8_e4m3fn),
        x.new_empty(width // GROUP, rows, dtype=torch.float32),
        x.new_empty(rows, width, dtype=torch.bfloat16),
    )


@torch.library.custom_op("bitplan_benchmark::multiply", mutates_args=())
def multiply(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """Return the product of integers under their scales, [rows, out], bf16."""
    recipe = ScalingType.BlockWise1x128
    return scaled_mm(x, weight.t(), x_scales.t(), recipe, weight_scales.t(), recipe)


@multiply.register_fake
def _(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x_integers, x_scales, x_values = split(x)
        integers, scales, values = split(weight)
        ctx.save_for_backward(x_values, values)
        ctx.dtypes = x.dtype, weight.dtype
        return multiply(x_integers, x_scales, integers, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        return (grad @ weight).to(ctx.dtypes[0]), (grad.t() @ x).to(ctx.dtypes[1])


class Fp8Linear(nn.Linear):
    """A linear without a bias whose forward product runs on integers."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            y = _Product.apply(input.reshape(-1, input.shape[-1]), self.weight)
        return y.view(*input.shape[:-1], -1)
