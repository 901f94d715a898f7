"""Hadamard rotation: an orthonormal mixing of a linear's inputs before both operands are rounded.

    y = Q(x H) Q(W H)^T,    H H^T = 1,    so that without rounding y = x W^T

An outlier of one channel is spread over all that are mixed with it, so that the scales of its
groups fall; the other way to deal with FC2's inputs than 8 bits. H is block diagonal: Sylvester's
Hadamard matrix over sqrt(size), of the largest power of two that divides the width. It is not
trained and adds no parameters. H is its own transpose and inverse, so the gradient of x H is its
gradient times H; that of the rounding goes straight through, as everywhere (quantizers.py).

The butterflies take n log2(size) additions. Running such a model needs the same transform before
the linear; the weight is rotated once. No export target has a place for that.
"""

from typing import Any

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.qat.quantizers import fake_quantize


def block_size(width: int) -> int:
    """Return the largest power of two that divides `width`; 1 mixes nothing."""
    return width & -width


def rotate(x: Tensor) -> Tensor:
    """Return x H, [..., width], in the dtype of `x`; float32 or wider within."""
    rotated: Tensor = _Rotate.apply(x)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """The rotation, which is its own gradient: nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _butterflies(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return _butterflies(grads[0])


def _butterflies(x: Tensor) -> Tensor:
    size, y, half = block_size(x.shape[-1]), x.to(torch.promote_types(x.dtype, torch.float32)), 1
    while half < size:
        low, high = y.reshape(-1, 2, half).unbind(1)
        y = torch.stack((low + high, low - high), 1)
        half *= 2
    scale: float = size**-0.5
    return (y.reshape(x.shape) * scale).to(x.dtype)


class Rotated:
    """Rotates an operand of a linear and rounds it; stands where a linear has its quantizers.

    fmt: None where the other operand alone is rounded.
    """

    factor = None

    def __init__(self, fmt: Format | None) -> None:
        self.format = fmt

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` rotated and rounded, [..., in_features]."""
        x = rotate(x)
        return x if self.format is None else fake_quantize(x, self.format)

    def hold(self, held: bool) -> None:
        """Keep nothing: a weight's gradient has to pass through its rotation every time."""
