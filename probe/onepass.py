"""One pass over a tensor: everything the streaming statistics need, per row and per channel.

`one_pass` is the contract. Rows come back one by one, so that tokens can be kept, left out or
weighed afterwards: [rows, 6 + formats], float64, the five columns of moments.row_moments, the
largest |x|, and the squared quantization error in each format. What is summed over the rows
(channels, histogram, counts) is added to `Totals` in place. Values that are not finite are counted
and read as zeros.

Compiled code fulfills it, in one read, where there is some for the tensor (onepass_cpu.py,
onepass_gpu.py); formats that this code does not measure cost a second read, in torch operations.
`eager` does all of it in torch operations: the oracle of the tests, and what runs where nothing
compiled does.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.probe import onepass_cpu, onepass_gpu
from bitplan.probe.histogram import add_to_histogram
from bitplan.probe.moments import row_moments
from bitplan.probe.totals import Totals
from bitplan.quantize import quantize_dequantize

_CPU_BLOCK = 1 << 18  # elements; the temporaries of a block stay in a core's cache
_GPU_BLOCK = 1 << 26
_COMPILED: dict[str, Any] = {"cpu": onepass_cpu, "cuda": onepass_gpu}
ROW = 6  # columns of a row before its errors
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one_pass(x: Tensor, formats: tuple[Format, ...], totals: Totals) -> Tensor:
    """Read `x` [rows, in_features], at least one element; add to `totals`, and return its rows.

    On a GPU the host does not wait. Formats with one scale per tensor take it from this `x`. Dtypes
    other than float32, bfloat16 and float16 are copied to float32 first.
    """
    return passes([x], formats, [totals])[0]


def passes(
    tensors: Sequence[Tensor], formats: tuple[Format, ...], totals: Sequence[Totals]
) -> list[Tensor]:
    """Do `one_pass` for tensors of one dtype and device, each with its totals.

    On a GPU a launch reads many of them: small ones alone would not fill it.
    """
    tensors = [x if x.dtype in _DTYPES else x.float() for x in tensors]
    device = tensors[0].device
    compiled = _COMPILED.get(device.type)
    if compiled is None or not compiled.available(device):
        return [eager(x, formats, total) for x, total in zip(tensors, totals, strict=True)]
    fused, others, order = _split(compiled.fuses, formats, tensors[0].dtype)
    found: list[Tensor] = compiled.passes(tensors, fused, totals)
    if not others:
        return found
    for i, x in enumerate(tensors):
        columns = [*found[i].unbind(1), *eager_errors(x, others).unbind(1)]
        found[i] = torch.stack([columns[place] for place in order]).mT
    return found


@cache
def _split(
    fuses: Callable[[Format, torch.dtype], bool], formats: tuple[Format, ...], dtype: torch.dtype
) -> tuple[tuple[Format, ...], tuple[Format, ...], list[int]]:
    """Return the formats that are fused, the others, and where the columns of a row then lie."""
    fused = tuple(fmt for fmt in formats if fuses(fmt, dtype))
    others = tuple(fmt for fmt in formats if fmt not in fused)
    place = {fmt: ROW + i for i, fmt in enumerate((*fused, *others))}
    return fused, others, [*range(ROW), *(place[fmt] for fmt in formats)]


def eager(x: Tensor, formats: Sequence[Format], totals: Totals) -> Tensor:
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
    return torch.cat([moments, row_absmax[:, None], eager_errors(x, formats)], 1)


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
