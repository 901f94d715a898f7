"""One pass over a tensor: everything the streaming statistics need, per row and per channel.

`one_pass` is the contract. Rows come back with their moments, their largest |x| and their squared
quantization error in each format, so that tokens can be kept, left out or weighed afterwards. What
is summed over the rows (channels, histogram, counts) is added to `Totals` in place. Values that are
not finite are counted and read as zeros.

Compiled code fulfills it, in one read, where there is some for the tensor (onepass_cpu.py,
onepass_gpu.py); formats that this code does not measure cost a second read, in torch operations.
`eager` does all of it in torch operations: the oracle of the tests, and what runs where nothing
compiled does.
"""

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.probe import onepass_cpu, onepass_gpu
from bitplan.probe.histogram import add_to_histogram, empty_histogram
from bitplan.probe.moments import row_moments
from bitplan.quantize import quantize_dequantize

_CPU_BLOCK = 1 << 18  # elements; the temporaries of a block stay in a core's cache
_GPU_BLOCK = 1 << 26
_COMPILED = (onepass_cpu, onepass_gpu)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Totals(NamedTuple):
    """What passes add up: [in_features] each, but for the histogram and `nonfinite`, [2].

    Float64 but for `absmax`, float32. counts: finite elements. nonfinite: NaN, infinite.
    """

    histogram: Tensor
    absmax: Tensor
    squares: Tensor
    counts: Tensor
    nonfinite: Tensor


class Rows(NamedTuple):
    """What a pass found in each row, float64: moments [rows, 5] as moments.row_moments, absmax
    [rows], and squared quantization errors [rows, formats].
    """

    moments: Tensor
    absmax: Tensor
    errors: Tensor


def empty_totals(in_features: int, device: torch.device) -> Totals:
    """Return the totals of nothing."""
    floats = torch.zeros(3 * in_features + 2, dtype=torch.float64, device=device)
    sizes = [in_features, in_features, 2, in_features]
    squares, counts, nonfinite, spare = torch.split(floats, sizes)
    absmax = spare.view(torch.float32)[:in_features]
    return Totals(empty_histogram(device), absmax, squares, counts, nonfinite)


def one_pass(x: Tensor, formats: Sequence[Format], totals: Totals) -> Rows:
    """Read `x` [rows, in_features], at least one element, and add it to `totals`.

    On a GPU the host does not wait. Formats with one scale per tensor take it from this `x`. Dtypes
    other than float32, bfloat16 and float16 are copied to float32 first.
    """
    if x.dtype not in _DTYPES:
        x = x.float()
    compiled = next((module for module in _COMPILED if module.available(x)), None)
    if compiled is None:
        return eager(x, formats, totals)
    fused = [compiled.fuses(fmt, x) for fmt in formats]
    rows = Rows(*compiled.one_pass(x, list(compress(formats, fused)), *totals))
    if all(fused):
        return rows
    columns = iter(rows.errors.unbind(1))
    others = iter(eager_errors(x, list(compress(formats, (not done for done in fused)))).unbind(1))
    return rows._replace(errors=torch.stack([next(columns if f else others) for f in fused], 1))


def eager(x: Tensor, formats: Sequence[Format], totals: Totals) -> Rows:
    """Do what `one_pass` says in torch operations."""
    histogram, absmax, squares, counts, nonfinite = totals
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
    return Rows(moments, row_absmax, eager_errors(x, formats))


def eager_errors(x: Tensor, formats: Sequence[Format]) -> Tensor:
    """Return the squared quantization errors of the rows, [rows, formats], in torch operations."""
    errors = torch.zeros(x.shape[0], len(formats), dtype=torch.float64, device=x.device)
    for blocks, tensor_wide in ((_blocks(x), False), ((x,), True)):
        chosen = [
            i
            for i, fmt in enumerate(formats)
            if fmt.is_quantized
            and (fmt.granularity == "tensor" or fmt.kind == "nvfp4") is tensor_wide
        ]
        end = 0
        for block in blocks if chosen else ():
            clean = block.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            start, end = end, end + block.shape[0]
            for i in chosen:
                difference = quantize_dequantize(clean, formats[i]) - clean
                errors[start:end, i] = difference.square_().sum(-1)
    return errors


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    size = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    return torch.split(x, max(1, size // x.shape[1]))
