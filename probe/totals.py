"""What is summed over all rows of a tensor, in memory that every pass adds to."""

from typing import NamedTuple

import torch
from torch import Tensor

from bitplan.probe.histogram import empty_histogram


class Totals(NamedTuple):
    """What passes add up: [in_features] each, but for the histogram and `nonfinite`, [2].

    Float64 but for `absmax`, float32. counts: finite elements. nonfinite: NaN, infinite.
    """

    histogram: Tensor
    absmax: Tensor
    squares: Tensor
    counts: Tensor
    nonfinite: Tensor


def empty_totals(in_features: int, device: torch.device) -> Totals:
    """Return the totals of nothing."""
    floats = torch.zeros(3 * in_features + 2, dtype=torch.float64, device=device)
    sizes = [in_features, in_features, 2, in_features]
    squares, counts, nonfinite, spare = torch.split(floats, sizes)
    absmax = spare.view(torch.float32)[:in_features]
    return Totals(empty_histogram(device), absmax, squares, counts, nonfinite)
