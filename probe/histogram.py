"""A histogram fine enough for quantiles: the top bits of float32, counted.

A bin is a sign, an exponent and 10 bits of mantissa, so that its middle is within 2^-11 (0.05 %) of
every value in it. Bins reach from 2^-64 (what is smaller counts as zero) to 2^32 (what is larger
falls into the last one). Counts are integers: the same whatever the order they were added in.
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_MANTISSA_BITS = 10
_SHIFT = 23 - _MANTISSA_BITS
_LOWEST = (127 - 64) << _MANTISSA_BITS
_BINS = 96 << _MANTISSA_BITS


def empty_histogram(device: torch.device) -> Tensor:
    """Return a histogram of nothing: int32, the positive bins and then the negative ones."""
    return torch.zeros(2 * _BINS, dtype=torch.int32, device=device)


def add_to_histogram(histogram: Tensor, x: Tensor, magnitude: Tensor) -> None:
    """Count the elements of a finite float32 tensor, given with its absolute value."""
    index = magnitude.view(torch.int32) >> _SHIFT
    index.sub_(_LOWEST).clamp_(0, _BINS - 1).sub_(x.view(torch.int32) >> 31, alpha=_BINS)
    histogram.index_add_(0, index.flatten(), index.new_ones(()).expand(x.numel()))


def read_histogram(
    histogram: Tensor, shares: tuple[float, ...], total: Tensor, mean: Tensor, distance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return quantiles of |x|, [shares], and the share of x farther than `distance` from `mean`.

    Between two order statistics quantiles are linear, as in numpy. Bins are near or far by their
    middle; NaN where a bin at the mean is wider than a third of the distance, so that it cannot be
    told. total: the number of elements; this and the other scalars are float64.
    """
    middles = _middles(histogram.device)
    # Without the first bin, which the count of zeros may have run past 2^31: it is what is left.
    upto = F.pad(histogram.view(2, _BINS)[:, 1:].cumsum(1, dtype=torch.int64), (1, 0))
    everything = upto[:, -1].sum()
    zeros = total.long() - everything

    # Scalars of Python travel with the kernels; a tensor from the host would make it wait.
    ranks = torch.stack([share * (total - 1).clamp_min(0) for share in shares])
    order = torch.stack([ranks.floor(), ranks.ceil()]).long()
    found = torch.searchsorted(upto.sum(0) + zeros, order, right=True).clamp_max(_BINS - 1)
    low, high = middles[found]
    quantiles = torch.lerp(low, high, ranks - ranks.floor())

    # Of positive values the far ones lie outside [mean - distance, mean + distance]; of negative
    # ones the magnitudes outside [-mean - distance, -mean + distance].
    signed = torch.stack([mean, -mean])
    last = torch.searchsorted(middles[1:], signed + distance, right=True)
    first = torch.searchsorted(middles[1:], signed - distance)
    near = (upto.gather(1, last[:, None]) - upto.gather(1, first[:, None])).clamp_min(0).sum()
    far = everything - near + zeros * (mean.abs() > distance)
    resolved = mean.abs() * 2.0**-_MANTISSA_BITS <= distance / 3
    return quantiles, torch.where(resolved, far / total, math.nan)


@cache
def _middles(device: torch.device) -> Tensor:
    """Return the middle of each bin of |x|, float64; that of the first is 0."""
    bins = torch.arange(_BINS, device=device, dtype=torch.int32)
    middles = ((bins + _LOWEST << _SHIFT) + (1 << _SHIFT - 1)).view(torch.float32).double()
    middles[0] = 0.0
    return middles
