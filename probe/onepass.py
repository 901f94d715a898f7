"""One pass over a tensor: everything the streaming statistics need, per row and per channel.

`one_pass` is the contract, `eager` its reference in plain torch operations: the oracle of the
tests, and what runs where nothing compiled does. Rows carry their moments, their largest |x| and
their squared quantization error in each format, so that tokens can be kept, left out or weighed
afterwards; channels carry their extremes and squares; the histogram (histogram.py) is added to in
place. Values that are not finite are counted and read as zeros.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.probe.histogram import add_to_histogram
from bitplan.probe.moments import row_moments
from bitplan.quantize import quantize_dequantize

_CPU_BLOCK = 1 << 18  # elements; the temporaries of a block stay in a core's cache
_GPU_BLOCK = 1 << 26


class OnePass(NamedTuple):
    """What one pass found; float64 but for `channel_absmax`, which is float32.

    moments: [rows, 5], as moments.row_moments. absmax: [rows]. errors: squared quantization error,
    [rows, formats]. channel_absmax, channel_squares, channel_counts (finite elements):
    [in_features]. nonfinite: numbers of NaN and of infinities, [2].
    """

    moments: Tensor
    absmax: Tensor
    errors: Tensor
    channel_absmax: Tensor
    channel_squares: Tensor
    channel_counts: Tensor
    nonfinite: Tensor


def one_pass(x: Tensor, formats: Sequence[Format], histogram: Tensor) -> OnePass:
    """Read `x` [rows, in_features] once and add it to `histogram`; the host does not wait.

    Formats with one scale per tensor take it from this `x`.
    """
    return eager(x, formats, histogram)


def eager(x: Tensor, formats: Sequence[Format], histogram: Tensor) -> OnePass:
    """Do what `one_pass` says in torch operations."""
    rows, width = x.shape

    def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=x.device)

    errors = zeros(rows, len(formats))
    absmax, squares, counts = zeros(width, dtype=torch.float32), zeros(width), zeros(width)
    nonfinite = zeros(2)
    size = max(1, (_CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK) // max(width, 1))
    found = [row_moments(x[:0].float(), None)] if rows == 0 or width == 0 else []
    for start in range(0, rows if width else 0, size):
        block = x[start : start + size].float()
        # On a CPU, where looking costs no wait, None stands for all of them being finite.
        valid = None
        if block.device.type != "cpu" or not bool(torch.isfinite(block.sum(-1)).all()):
            valid = torch.isfinite(block)
            nonfinite += torch.stack([block.isnan().sum(), block.isinf().sum()])
            block = torch.where(valid, block, 0)
        magnitude = block.abs()
        found.append(row_moments(block, valid))
        torch.maximum(absmax, magnitude.amax(0), out=absmax)
        squares += (block * block).sum(0)
        counts += block.shape[0] if valid is None else valid.sum(0)
        add_to_histogram(histogram, block, magnitude)
        for i, fmt in enumerate(formats):
            if not is_tensor_wide(fmt):
                errors[start : start + size, i] = squared_errors(block, fmt)
    for i, fmt in enumerate(formats):
        if is_tensor_wide(fmt):
            errors[:, i] = squared_errors(finite(x), fmt)
    moments, row_absmax = (torch.cat(parts) for parts in zip(*found, strict=True))
    return OnePass(moments, row_absmax, errors, absmax, squares, counts, nonfinite)


def is_tensor_wide(fmt: Format) -> bool:
    """Whether a scale of the format depends on the whole tensor."""
    return fmt.granularity == "tensor" or fmt.kind == "nvfp4"


def finite(x: Tensor) -> Tensor:
    """Return `x` as float32 with zeros for what is not finite."""
    return x.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def squared_errors(x: Tensor, fmt: Format) -> Tensor:
    """Return the squared quantization error of each row of a finite `x`, [rows]."""
    if not fmt.is_quantized:
        return x.new_zeros(x.shape[0])
    return (quantize_dequantize(x, fmt) - x).square_().sum(-1)
