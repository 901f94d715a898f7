"""Quantize-dequantize: the arithmetic that the probe measures and QAT trains under.

The one module of core that imports torch. `quantize_dequantize` is pure: a tensor and a format in,
the tensor as that format would hold it out. Integers follow the paper ("Scaling Law for
Quantization-Aware Training", arXiv 2505.14302): AbsMax scales, s = max|X| / 2^(b-1), values
round(x / s) clamped to [-2^(b-1), 2^(b-1) - 1], so the positive extreme loses one step. Rounding is
half to even. Arithmetic is float32 whatever the dtype; scales of integer formats are not rounded.
Groups run along the last dimension; zeros pad a short last group, which leaves its AbsMax alone.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bitplan.formats import Format

E2M1_MAX = 6.0
E4M3_MAX = 448.0


def quantize_dequantize(x: Tensor, fmt: Format) -> Tensor:
    """Return `x` rounded to the values that `fmt` can hold, in the dtype of `x`.

    x: [..., in_features], floating point. A group that holds a NaN or an infinity comes back NaN.
    """
    if not fmt.is_quantized or x.numel() == 0:
        return x
    return ungroup(_round_groups(group(x.float(), fmt), fmt), x).to(x.dtype)


def group(x: Tensor, fmt: Format) -> Tensor:
    """Lay out `x` so that the elements that share a scale are the last dimension."""
    if fmt.granularity == "tensor":
        return x.reshape(1, -1)
    size = fmt.group_size
    if size is None or size >= x.shape[-1]:
        return x
    if padding := -x.shape[-1] % size:
        x = F.pad(x, (0, padding))
    return x.reshape(*x.shape[:-1], -1, size)  # [..., group, group_size]


def ungroup(q: Tensor, like: Tensor) -> Tensor:
    """Undo `group`: drop the padding and restore the shape of `like`."""
    if q.dim() > like.dim():
        q = q.flatten(-2)[..., : like.shape[-1]]
    return q.reshape(like.shape)


def _round_groups(x: Tensor, fmt: Format) -> Tensor:
    """Round the last dimension of `x`, whose elements share a scale, to the format's values."""
    absmax = x.abs().amax(-1, keepdim=True)
    match fmt.kind:
        case "int":
            half = 2 ** (fmt.bits - 1)
            scale = _nonzero(absmax / half)
            return (x / scale).round_().clamp_(-half, half - 1).mul_(scale)
        case "fp8":
            scale = _nonzero(absmax / E4M3_MAX)
            return _round_e4m3(x / scale) * scale
        case "mxfp4":
            # OCP MX: the shared exponent is floor(log2(max)) less that of the largest E2M1 value.
            scale = torch.exp2(torch.floor(torch.log2(_nonzero(absmax))) - 2).clamp_min(2.0**-127)
            return _round_e2m1(x / scale) * scale
        case "nvfp4":
            # Two levels: E4M3 scales of the groups, and one scale of the tensor that fits them.
            tensor_scale = _nonzero(absmax.amax() / (E4M3_MAX * E2M1_MAX))
            scale = _nonzero(_round_e4m3(absmax / E2M1_MAX / tensor_scale) * tensor_scale)
            return _round_e2m1(x / scale) * scale
        case _:
            raise AssertionError(f"no arithmetic for {fmt}")


def _nonzero(scale: Tensor) -> Tensor:
    """Replace zero scales (a group of zeros) by one; NaN stays."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _round_e4m3(x: Tensor) -> Tensor:
    # The cast turns what is above the largest value into NaN, so clamp first; NaN passes a clamp.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _round_e2m1(x: Tensor) -> Tensor:
    """Round to {0, 0.5, 1, 1.5, 2, 3, 4, 6} with sign, ties to the even mantissa, saturating."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((x / step).round_() * step).clamp(-E2M1_MAX, E2M1_MAX)
