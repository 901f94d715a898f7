"""Fake quantization with a straight-through estimator: forward rounds, backward does not see it.

`fake_quantize` is the paper's AbsMax quantizer (arXiv 2505.14302, section 3):

    forward   quantize_dequantize(x, format), to the last bit (core/quantize.py); one kernel on a
              GPU (fused.py)
    backward  the identity: dL/dx = dL/dq; the scale covers the range and gets no gradient

`scaled_fake_quantize` trains the scale. With u = x / s and half = 2^(b-1):

    forward   q = s clamp(round(u), -half, half - 1)
    backward  with the rounding r = round(u) - u held still, q = x + s r: dq/dx = 1, dq/ds = r;
              beyond the clamp q = s (half - 1) or -s half: dq/dx = 0, dq/ds = half - 1 or -half

which is LSQ's estimator (arXiv 1902.08153). LWC, LAC and LSQ differ in what the scale is made of: a
trained factor, 1 at first, times the AbsMax scale of the tensor as it is (LWC per weight scale, LAC
per group index for all tokens), or times the AbsMax scale at the start (LSQ: the step is learned).

Under autocast an input is what autocast would multiply, as in statistics (probe/observe.py): bf16
values are rounded to 4 bits. A weight is rounded from its own dtype, and then cast.

Rounding is repeated where it must be and nowhere else: a tensor that several linears read (q/k/v;
gate/up) is rounded once a forward pass, and a weight once per value while no gradients are recorded
(evaluation). In training every pass rounds the weights anew, so that nothing stale can be trained
on, unless the caller says that several passes come before the next step (convert.weights_held).
"""

from typing import Any

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.probe.observe import as_multiplied, multiplied_dtype
from bitplan.qat.fused import quantize_operand
from bitplan.quantize import group, ungroup

INPUT_FACTOR, WEIGHT_FACTOR = FACTORS = ("input_factor", "weight_factor")
"""Names of the parameters that a linear gets where the scales of its sites are trained."""
MIN_FACTOR = 1e-3


class _StraightThrough(torch.autograd.Function):
    """Return the second argument; send its gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        return grads[0].to(ctx.dtype), None


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized` (of the shape of `x`, its dtype may differ) with the gradient of `x`."""
    result: Tensor = _StraightThrough.apply(x, quantized)  # type: ignore[no-untyped-call]
    return result


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Return `x` rounded to `fmt`, with the identity as its gradient; [..., in_features].

    Under autocast the result has the dtype that is multiplied: rounding, then the cast.
    """
    return straight_through(x, quantize_operand(x.detach(), fmt))


class _Scaled(torch.autograd.Function):
    """The rounding of grouped values [..., group_size] by scales that broadcast against them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, half: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.half = half
        # Not in place: compiled by torch 2.11, an output that was written in place has no gradient.
        return (x / scale).round().clamp(-half, half - 1) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (grad,), (x, scale), half = grads, ctx.saved_tensors, ctx.half
        u = x / scale
        rounded = u.round()
        inside = (rounded >= -half) & (rounded <= half - 1)
        to_scale = torch.where(inside, rounded - u, rounded.clamp(-half, half - 1))
        return grad * inside, (grad * to_scale).sum_to_size(scale.shape), None


def scaled_fake_quantize(x: Tensor, fmt: Format, factor: Tensor, step: Tensor | None) -> Tensor:
    """Return `x` rounded to an integer format under trained scales; [..., in_features].

    factor: as `factor_shape` says, above 0. step: the scales it multiplies, None for the AbsMax
    scales of `x` itself. Gradients go to `x` and to `factor`.
    """
    half = 2 ** (fmt.bits - 1)
    grouped = group(x.float(), fmt)
    if step is None:
        step = grouped.detach().abs().amax(-1, keepdim=True) / half
    # A factor at zero or below would turn signs round; a group of zeros has no scale.
    scale = factor.float().clamp_min(MIN_FACTOR) * torch.where(step == 0, 1.0, step)
    rounded: Tensor = _Scaled.apply(grouped, scale, half)  # type: ignore[no-untyped-call]
    return ungroup(rounded, x).to(x.dtype)


def factor_shape(weight: Tensor, fmt: Format, quantizer: str) -> tuple[int, ...]:
    """Return the shape of a quantizer's trained factor beside a weight [out, in].

    `lac` has one factor per group of the input dimension, the others one per scale of the weight.
    """
    rows = weight[:1] if quantizer == "lac" else weight
    shape = (*group(rows, fmt).shape[:-1], 1)
    return shape[1:] if quantizer == "lac" else shape


def first_step(weight: Tensor, fmt: Format) -> Tensor:
    """Return LSQ's scales at the start, those of AbsMax, of the shape of its factor.

    The start of its paper, 2 mean|x| / sqrt(half - 1), is for training from scratch: it doubles the
    step of a normal distribution's groups, which costs a checkpoint what it then has to win back.
    """
    largest = group(weight.detach().float(), fmt).abs().amax(-1, keepdim=True)
    return largest / 2.0 ** (fmt.bits - 1)


class InputQuantizer:
    """Fake-quantizes the input of `num_readers` linears, once for all that read the same tensor.

    The result is dropped after the last reader, so that no activation outlives its pass.
    """

    def __init__(self, fmt: Format, *, num_readers: int = 1, factor: Tensor | None = None) -> None:
        self.format = fmt
        self.factor = factor
        self.num_readers = num_readers
        self._slot: tuple[Tensor, int, Tensor] | None = None
        self._reads = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` rounded, [..., in_features]."""
        quantized = self._shared(x)
        # Gradients of the readers meet at x, in its dtype, and not before, in a narrower one.
        return quantized if self.factor is not None else straight_through(x, quantized)

    def _shared(self, x: Tensor) -> Tensor:
        if self.num_readers == 1 or _is_untracked(x):
            return self._rounded(x)
        if self._slot is None or self._slot[0] is not x or self._slot[1] != x._version:
            self._slot = (x, x._version, self._rounded(x))
            self._reads = 0
        self._reads += 1
        quantized = self._slot[2]
        if self._reads == self.num_readers:
            self._slot = None
        return quantized

    def _rounded(self, x: Tensor) -> Tensor:
        if self.factor is None:
            return quantize_operand(as_multiplied(x.detach()), self.format)
        return scaled_fake_quantize(x, self.format, self.factor, None)


class WeightQuantizer:
    """Fake-quantizes a weight [out_features, in_features]: once per value where that is safe.

    That is under `no_grad`, and in training while `is_held` (see convert.weights_held).
    """

    def __init__(
        self, fmt: Format, *, factor: Tensor | None = None, step: Tensor | None = None
    ) -> None:
        self.format = fmt
        self.factor = factor
        self.step = step
        self.is_held = False
        self._slot: tuple[tuple[Any, ...], Tensor] | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the weight rounded along its last dimension."""
        in_training = torch.is_grad_enabled()
        may_keep = not in_training or (self.is_held and self.factor is None)
        if _is_untracked(weight) or not may_keep:
            self._slot = None
            return _rounded(weight, self.format, self.factor, self.step)
        trained = () if self.factor is None else (self.factor._version, self.factor.data_ptr())
        key = (weight._version, weight.data_ptr(), multiplied_dtype(weight), *trained)
        if self._slot is None or self._slot[0] != key:
            with torch.no_grad():
                self._slot = (key, _rounded(weight, self.format, self.factor, self.step))
        quantized = self._slot[1]
        return straight_through(weight, quantized) if in_training else quantized

    def hold(self, held: bool) -> None:
        """Start or end a time in which the weight stays what it is; forget what it was."""
        self.is_held = held
        self._slot = None


def _is_untracked(x: Tensor) -> bool:
    """Whether nothing tells if `x` has changed: inference mode, and traces for torch.compile.

    A compiler sees for itself what is computed twice, and these questions would break its graph.
    """
    return torch.compiler.is_compiling() or x.is_inference()


def _rounded(x: Tensor, fmt: Format, factor: Tensor | None, step: Tensor | None) -> Tensor:
    return fake_quantize(x, fmt) if factor is None else scaled_fake_quantize(x, fmt, factor, step)
