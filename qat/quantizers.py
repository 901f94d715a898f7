"""Fake quantization with a straight-through estimator: forward rounds, backward does not see it.

    forward   quantize_dequantize(x, format), to the last bit (core/quantize.py)
    backward  the identity: dL/dx = dL/dq

That is the paper's AbsMax quantizer (arXiv 2505.14302, section 3): the scale covers the range, so
no gradient is clipped, and the scale itself gets none. Rounding is repeated where it must be and
nowhere else: a tensor that several linears read (q/k/v; gate/up) is rounded once a forward pass,
and a weight once per value while no gradients are recorded (evaluation). In training every pass
rounds the weights anew, since a step follows each; nothing stale can be trained on.
"""

from typing import Any

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.quantize import quantize_dequantize


class _StraightThrough(torch.autograd.Function):
    """Return the second argument; send its gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        return grads[0], None


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized` (of the shape of `x`) with the gradient of `x`."""
    result: Tensor = _StraightThrough.apply(x, quantized)  # type: ignore[no-untyped-call]
    return result


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Return `x` rounded to `fmt`, with the identity as its gradient; [..., in_features]."""
    return straight_through(x, quantize_dequantize(x.detach(), fmt))


class InputQuantizer:
    """Fake-quantizes the input of `num_readers` linears, once for all that read the same tensor.

    The result is dropped after the last reader, so that no activation outlives its pass.
    """

    def __init__(self, fmt: Format, *, num_readers: int = 1) -> None:
        self.format = fmt
        self.num_readers = num_readers
        self._slot: tuple[Tensor, int, Tensor] | None = None
        self._reads = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` rounded, [..., in_features]."""
        if self.num_readers == 1 or x.is_inference():
            return fake_quantize(x, self.format)
        if self._slot is None or self._slot[0] is not x or self._slot[1] != x._version:
            self._slot = (x, x._version, fake_quantize(x, self.format))
            self._reads = 0
        self._reads += 1
        quantized = self._slot[2]
        if self._reads == self.num_readers:
            self._slot = None
        return quantized


class WeightQuantizer:
    """Fake-quantizes a weight [out_features, in_features], once per value under `no_grad`."""

    def __init__(self, fmt: Format) -> None:
        self.format = fmt
        self._slot: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the weight rounded along its last dimension."""
        if torch.is_grad_enabled() or weight.is_inference():
            self._slot = None
            return fake_quantize(weight, self.format)
        key = (weight._version, weight.data_ptr())
        if self._slot is None or self._slot[0] != key:
            self._slot = (key, quantize_dequantize(weight, self.format))
        return self._slot[1]
