"""Quantize-dequantize in one kernel on a GPU: one read, one write, no temporaries.

`quantize_operand` is what fake quantization calls: `quantize_dequantize` (core/quantize.py), to the
last bit, and then the cast that autocast makes before it multiplies. Integers whose scales run
along the last dimension have a kernel on CUDA devices (fused_kernel.py); the eager code does the
rest.

The operator `bitplan::round_groups` stays one node in the graph of torch.compile, and can be
captured in a CUDA graph: it waits for nothing and allocates with torch alone. The first call for a
dtype and a format compiles, so take a step before capturing. Triton comes with torch's CUDA builds
for Linux; without it (a warning says so once) and with BITPLAN_COMPILE=0 the eager code serves CUDA
devices too.
"""

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.probe.observe import multiplied_dtype
from bitplan.quantize import quantize_dequantize

_IS_WANTED = os.environ.get("BITPLAN_COMPILE") != "0"
HAS_KERNEL = _IS_WANTED and find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_GROUP = 1 << 15  # elements, all in the registers of one program
_TILE = 1 << 12  # elements of a program, if a group has no more

_log = logging.getLogger(__name__)


def quantize_operand(x: Tensor, fmt: Format) -> Tensor:
    """Return `x` rounded to `fmt`, in the dtype in which it is multiplied; [..., in_features].

    That is autocast's where autocast is on and `x` is float32, else that of `x`. No gradient.
    """
    dtype = multiplied_dtype(x)
    if not is_fused(x, fmt):
        return quantize_dequantize(x, fmt).to(dtype)
    quantized: Tensor = torch.ops.bitplan.round_groups(x, fmt.bits, _group_size(x, fmt), dtype)
    return quantized


def is_fused(x: Tensor, fmt: Format) -> bool:
    """Whether there is a kernel for the tensor and the format."""
    return (
        HAS_KERNEL
        and x.is_cuda
        and fmt.kind == "int"
        and fmt.granularity != "tensor"
        and x.dtype in _DTYPES
        and x.numel() > 0
        and _group_size(x, fmt) <= _MAX_GROUP
    )


@cache
def warn_without_kernel() -> None:
    """Say once that CUDA devices are served by the eager code, unless that was asked for."""
    if _IS_WANTED and not HAS_KERNEL:
        _log.warning(
            "fake quantization on GPUs runs in some fifteen kernels in place of one: triton is not "
            "installed (BITPLAN_COMPILE=0 runs it so without this warning)"
        )


def _group_size(x: Tensor, fmt: Format) -> int:
    return min(fmt.group_size or x.shape[-1], x.shape[-1])


def _launch(x: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    from bitplan.qat.fused_kernel import round_groups

    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    width = x.shape[-1]
    groups = x.numel() // width * -(-width // group_size)
    lanes = 1 << (group_size - 1).bit_length()
    tile = max(1, _TILE // lanes)
    with torch.cuda.device(x.device):
        round_groups[(-(-groups // tile),)](
            x,
            out,
            groups,
            width,
            2.0 ** (bits - 1),
            2.0 ** (1 - bits),
            GROUP=group_size,
            EVEN=width % group_size == 0,
            LANES=lanes,
            TILE=tile,
            num_warps=min(16, max(4, lanes // 1024)),
        )
    return out


def _fake(x: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


_LIBRARY: Any = torch.library.Library("bitplan", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("round_groups(Tensor x, int bits, int group_size, ScalarType dtype) -> Tensor")
_LIBRARY.impl("round_groups", _launch, "CUDA")
torch.library.register_fake("bitplan::round_groups", _fake, lib=_LIBRARY)
