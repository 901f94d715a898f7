"""Hadamard rotation: an orthonormal mixing of a linear's inputs before both operands are rounded.

    y = Q(x H) Q(W H)^T,    H H^T = 1,    so that without rounding y = x W^T

An outlier of one channel is spread over all that are mixed with it, so that the scales of its
groups fall; the other way to deal with FC2's inputs than 8 bits. H is block diagonal: Sylvester's
Hadamard matrix over sqrt(size), of the largest power of two that divides the width. It is not
trained and adds no parameters. H is its own transpose and inverse, so the gradient of x H is its
gradient times H; that of the rounding goes straight through, as everywhere (quantizers.py).

H is the Kronecker product of matrices of order 32 and less, which are applied one after the other:
n log(size) work in two or three small matrix products. (One by one, the butterflies of order 2 took
three to five times as long on a CPU.) Running such a model needs the same transform before the
linear; the weight is rotated once. No export target has a place for that.
"""

from typing import Any

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.qat.quantizers import fake_quantize

_LARGEST_FACTOR = 32


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
        return _transform(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return _transform(grads[0])


def _transform(x: Tensor) -> Tensor:
    size, done = block_size(x.shape[-1]), 1
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    matrix = _sylvester(min(size, _LARGEST_FACTOR), y)
    with torch.autocast(x.device.type, enabled=False):
        while done < size:
            order = min(size // done, len(matrix))
            y = y.reshape(-1, order) @ matrix[:order, :order]
            # The last bits of the index are done: to the front, so that others are last.
            y = y.reshape(-1, size // order, order).transpose(1, 2)  # [block, done, left]
            done *= order
    scale: float = size**-0.5
    return (y.reshape(x.shape) * scale).to(x.dtype)


def _sylvester(order: int, like: Tensor) -> Tensor:
    """Return the Hadamard matrix of a power of two; its upper left corners are the smaller ones."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < order:
        upper = torch.cat((matrix, matrix), 1)
        matrix = torch.cat((upper, torch.cat((matrix, -matrix), 1)))
    return matrix


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
