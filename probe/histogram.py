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
    """Return quantiles of |x|, [..., shares], and the share of x that is far from the mean.

    histogram: [..., bins]; total (the number of elements), mean, distance: [...], float64. Far is
    farther than `distance`. Between two order statistics quantiles are linear, as in numpy. Bins
    are near or far by their middle; NaN where a bin at the mean is wider than a third of the
    distance, so that it cannot be told.
    """
    shape = total.shape
    total, mean, distance = total.view(-1), mean.view(-1), distance.view(-1)
    # Bins are summed by exponent first; of single bins only those of a few exponents are read.
    bins = histogram.view(len(total), 2, _BINS >> _MANTISSA_BITS, 1 << _MANTISSA_BITS)
    # On a CPU, where looking costs no wait, sums that fit into 32 bits need no copy in 64.
    fits = histogram.device.type == "cpu" and int(total.max()) < 1 << 31
    exponents = bins.sum(-1, dtype=torch.int32 if fits else torch.int64).long()
    # Without the first bin, which the count of zeros may have run past 2^31: it is what is left.
    exponents[..., 0] -= bins[..., 0, 0]
    everything = exponents.sum((1, 2))
    zeros = total.long() - everything
    middles = _middles(histogram.device)

    # Scalars of Python travel with the kernels; a tensor from the host would make it wait.
    ranks = torch.stack([share * (total - 1).clamp_min(0) for share in shares], -1)
    order = torch.cat([ranks.floor(), ranks.ceil()], -1).long()
    found = _bin_of(order, bins, exponents, zeros).clamp_max(_BINS - 1)
    low, high = middles[found].chunk(2, -1)
    quantiles = torch.lerp(low, high, ranks - ranks.floor())

    # Of positive values the far ones lie outside [mean - distance, mean + distance]; of negative
    # ones the magnitudes outside [-mean - distance, -mean + distance].
    signed = torch.stack([mean, -mean], -1)
    last = torch.searchsorted(middles[1:], signed + distance[:, None], right=True) + 1
    first = torch.searchsorted(middles[1:], signed - distance[:, None]) + 1
    inside = (_below(last, bins, exponents) - _below(first, bins, exponents)).clamp_min(0)
    far = everything - inside.sum(-1) + zeros * (mean.abs() > distance)
    resolved = mean.abs() * 2.0**-_MANTISSA_BITS <= distance / 3
    share = torch.where(resolved, far / total, math.nan)
    return quantiles.view(*shape, len(shares)), share.view(shape)


def _bin_of(order: Tensor, bins: Tensor, exponents: Tensor, zeros: Tensor) -> Tensor:
    """Return the bin of |x| that holds the order-th smallest one, [sites, orders]."""
    counts = exponents.sum(1)
    counts[:, 0] += zeros
    upto = counts.cumsum(-1)
    exponent = torch.searchsorted(upto, order, right=True).clamp_max(counts.shape[1] - 1)
    rest = order - (upto - counts).gather(1, exponent)
    site = torch.arange(len(bins), device=bins.device)[:, None]
    row = bins[site, 0, exponent].long() + bins[site, 1, exponent]
    row[..., 0] = torch.where(exponent == 0, zeros[:, None], row[..., 0])
    found = torch.searchsorted(row.cumsum(-1), rest[..., None], right=True)[..., 0]
    return (exponent << _MANTISSA_BITS) + found


def _below(limit: Tensor, bins: Tensor, exponents: Tensor) -> Tensor:
    """Return how many of each sign lie in the bins from 1 up to a limit, [sites, signs]."""
    size = bins.shape[-1]
    exponent = (limit >> _MANTISSA_BITS).clamp_max(bins.shape[2] - 1)
    before = (exponents.cumsum(-1) - exponents).gather(-1, exponent[..., None])[..., 0]
    site = torch.arange(len(bins), device=bins.device)[:, None]
    sign = torch.arange(2, device=bins.device)
    index = (exponent[..., None] << _MANTISSA_BITS) + torch.arange(size, device=bins.device)
    counted = (index < limit[..., None]) & (index > 0)
    return before + (bins[site, sign, exponent] * counted).sum(-1)


@cache
def _middles(device: torch.device) -> Tensor:
    """Return the middle of each bin of |x|, float64; that of the first is 0."""
    bins = torch.arange(_BINS, device=device, dtype=torch.int32)
    middles = ((bins + _LOWEST << _SHIFT) + (1 << _SHIFT - 1)).view(torch.float32).double()
    # Not `middles[0] = 0`: writing a scalar of the host into one element makes the host wait.
    return F.pad(middles[1:], (1, 0))
