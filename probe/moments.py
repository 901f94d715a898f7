"""Mean and central power sums up to the fourth, from float32 rows to float64 totals.

Moments are tensors [..., 5] of float64: n, mean, and the sums of (x - mean)^2, ^3 and ^4.

Each row is centered on its own mean in float32, scaled by a power of two so that fourth powers
neither overflow nor vanish, and corrected in float64 for what the float32 mean lost; rows are then
pooled by the formulas of Chan et al. and Pebay (SAND2008-6212). Raw power sums would lose the
kurtosis of N(1000, 1) even in float64.
"""

import math

import torch
from torch import Tensor


def row_moments(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return n, mean and central power sums of each row, [rows, 5], and its largest |x|, [rows]."""
    if valid is None:
        count = torch.full((x.shape[0],), x.shape[1], dtype=torch.float64, device=x.device)
        low, high = x.amin(-1), x.amax(-1)
    else:
        count = valid.sum(-1).double()
        low = torch.where(valid, x, math.inf).amin(-1)
        high = torch.where(valid, x, -math.inf).amax(-1)
    absmax = torch.maximum(high, -low).clamp_min(0)
    n = count.clamp_min(1)
    center = x.sum(-1) / n.float()
    # The power of two that brings the row's largest value near 1, by its exponent bits: exact.
    exponent = absmax.view(torch.int32) & 0x7F800000
    scale = ((254 << 23) - exponent).clamp_min(1 << 23).view(torch.float32)
    d = (x - center[:, None]).mul_(scale[:, None])
    if valid is not None:
        d.mul_(valid)
    d2 = d * d
    s1, s2 = d.sum(-1).double(), d2.sum(-1).double()
    s3, s4 = d.mul_(d2).sum(-1).double(), d2.mul_(d2).sum(-1).double()
    e = s1 / n
    unit = scale.double()
    m2 = s2 - n * e**2
    m3 = s3 - 3 * e * s2 + 2 * n * e**3
    m4 = s4 - 4 * e * s3 + 6 * e**2 * s2 - 3 * n * e**4
    # A row of one value has no spread; rounding would give it some.
    spread = high > low
    moments = torch.stack(
        [
            count,
            torch.where(spread | (count == 0), center.double() + e / unit, low.double()),
            (m2 / unit**2) * spread,
            (m3 / unit**3) * spread,
            (m4 / unit**4) * spread,
        ],
        dim=1,
    )
    return moments, absmax.double()


def pool(moments: Tensor) -> Tensor:
    """Join sets of moments [..., sets, 5] into one, [..., 5] (Pebay, SAND2008-6212)."""
    n, mean, m2, m3, m4 = moments.unbind(-1)
    total = n.sum(-1)
    pooled = (n * mean).sum(-1) / total.clamp_min(1)
    d = mean - pooled[..., None]
    # By Horner's rule: rows of tokens are many, and each operation reads and writes all of them.
    between = n * d * d
    third = torch.addcmul(m3, d, between.add(m2, alpha=3))
    fourth = torch.addcmul(4 * m3, d, between.add(m2, alpha=6)).mul_(d).add_(m4)
    sums = [(m2 + between).sum(-1), third.sum(-1), fourth.sum(-1)]
    return torch.stack([total, pooled, *sums], dim=-1)


def moments_of(values: Tensor) -> Tensor:
    """Return the moments [5] of a float64 vector."""
    one, zero = torch.ones_like(values), torch.zeros_like(values)
    return pool(torch.stack([one, values, zero, zero, zero], dim=-1))


def shape_of(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return standard deviation, skewness and kurtosis; the last two NaN for a constant."""
    n, mean, m2, m3, m4 = moments.unbind(-1)
    variance = m2 / n
    # Below this a spread is the rounding of float64 sums: one float32 step in 10^9 is above it.
    spread = variance > 1e-28 * mean**2
    skewness = torch.where(spread, m3 / n / variance**1.5, math.nan)
    kurtosis = torch.where(spread, m4 / n / variance**2, math.nan)
    return torch.where(spread, variance, variance * 0).sqrt(), skewness, kurtosis
