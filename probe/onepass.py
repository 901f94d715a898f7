"""One pass over a tensor: everything the streaming statistics need, per row and per channel.

`one_pass` is the contract. Rows carry their moments, their largest |x| and their squared
quantization error in each format, so that tokens can be kept, left out or weighed afterwards;
channels carry their extremes and squares; the histogram (histogram.py) is added to in place. Values
that are not finite are counted and read as zeros.

It is fulfilled by compiled code where there is some for the tensor's device, dtype and formats
(onepass_cpu.py, onepass_gpu.py), in one read of the tensor. Formats that this code does not measure
cost a second read, in torch operations. `eager` does all of it in torch operations: the oracle of
the tests, and what runs where nothing compiled does.
"""

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.probe import onepass_cpu
from bitplan.probe.histogram import add_to_histogram
from bitplan.probe.moments import row_moments
from bitplan.quantize import quantize_dequantize

_CPU_BLOCK = 1 << 18  # elements; the temporaries of a block stay in a core's cache
_GPU_BLOCK = 1 << 26
_COMPILED = (onepass_cpu,)


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
    """Read `x` [rows, in_features], at least one element, and add it to `histogram`.

    On a GPU the host does not wait. Formats with one scale per tensor take it from this `x`.
    """
    compiled = next((module for module in _COMPILED if module.available(x)), None)
    if compiled is None:
        return eager(x, formats, histogram)
    fused = [compiled.fuses(fmt) for fmt in formats]
    found = OnePass(*compiled.one_pass(x, list(compress(formats, fused)), histogram))
    if all(fused):
        return found
    columns = iter(found.errors.unbind(1))
    others = iter(eager_errors(x, list(compress(formats, (not done for done in fused)))).unbind(1))
    return found._replace(errors=torch.stack([next(columns if f else others) for f in fused], 1))


def eager(x: Tensor, formats: Sequence[Format], histogram: Tensor) -> OnePass:
    """Do what `one_pass` says in torch operations."""
    width = x.shape[1]
    squares, counts, nonfinite = (
        torch.zeros(size, dtype=torch.float64, device=x.device) for size in (width, width, 2)
    )
    absmax = torch.zeros(width, device=x.device)
    found = []
    for block in _blocks(x):
        clean, valid = block.float(), None
        # On a CPU, where looking costs no wait, None stands for all of them being finite.
        if x.device.type != "cpu" or not bool(torch.isfinite(clean.sum(-1)).all()):
            valid = torch.isfinite(clean)
            nonfinite += torch.stack([clean.isnan().sum(), clean.isinf().sum()])
            clean = torch.where(valid, clean, 0)
        magnitude = clean.abs()
        found.append(row_moments(clean, valid))
        torch.maximum(absmax, magnitude.amax(0), out=absmax)
        squares += (clean * clean).sum(0)
        counts += clean.shape[0] if valid is None else valid.sum(0)
        add_to_histogram(histogram, clean, magnitude)
    moments, row_absmax = (torch.cat(parts) for parts in zip(*found, strict=True))
    errors = eager_errors(x, formats)
    return OnePass(moments, row_absmax, errors, absmax, squares, counts, nonfinite)


def eager_errors(x: Tensor, formats: Sequence[Format]) -> Tensor:
    """Return the squared quantization errors of the rows, [rows, formats], in torch operations."""
    errors = torch.zeros(x.shape[0], len(formats), dtype=torch.float64, device=x.device)
    tensor_wide = [fmt.granularity == "tensor" or fmt.kind == "nvfp4" for fmt in formats]
    for parts, wanted in ((_blocks(x), False), ((x,), True)):
        chosen = [i for i, fmt in enumerate(formats) if fmt.is_quantized and tensor_wide[i] is wanted]
        start = 0
        for part in parts if chosen else ():
            clean = part.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            end = start + part.shape[0]
            for i in chosen:
                difference = quantize_dequantize(clean, formats[i]) - clean
                errors[start:end, i] = difference.square_().sum(-1)
            start = end
    return errors


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    size = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    return torch.split(x, max(1, size // x.shape[1]))
