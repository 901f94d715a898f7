"""The one pass on an NVIDIA GPU: onepass.cu, compiled while running and launched twice per batch.

CUDA C++ and not Triton: a histogram exact for bfloat16 needs 25 thousand counters in shared memory
that every warp adds to, and clamping by a saturated product, packed 16-bit maxima and sums on the
matrix units are instructions that Triton does not let one choose.

NVRTC, which comes with torch, compiles one variant per dtype, format list and width class, in about
a second, once per process. A launch fills one struct and never waits. Needed: a device that gives a
block 216 KB of shared memory (Hopper and later data-center GPUs). On others a warning says so once
and onepass.py falls back on torch operations; BITPLAN_COMPILE=0 asks for that, without a warning.
"""

import ctypes
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.probe.histogram import _BINS, _LOWEST, _SHIFT
from bitplan.probe.totals import Totals

_SOURCE = Path(__file__).with_name("onepass.cu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WARPS = 16
_SHARED_BYTES = 4 * ((1 << 15) + 0x5800)  # as onepass.cu lays it out; float16 takes the most
_ROWS_PER_WARP = 4  # fewer do not pay for a block's own histogram
_JOIN_THREADS, _JOINERS = 256, 8
_PASSES = 32  # tensors in a launch

_log = logging.getLogger(__name__)


class _Pass(ctypes.Structure):
    """The struct `Pass` of onepass.cu."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "parts",
                "squares_parts",
                "absmax_parts",
                "found",
                "histogram",
                "absmax",
                "squares",
                "counts",
                "nonfinite",
            )
        ),
        ("rows", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in (
                "width",
                "segments",
                "chunks",
                "row_blocks",
                "first_reader",
                "first_joiner",
            )
        ),
    ]


class _Batch(ctypes.Structure):
    """The struct `Batch` of onepass.cu."""

    _fields_ = [("passes", _Pass * _PASSES), ("count", ctypes.c_int32)]


@dataclass(frozen=True)
class _Variant:
    """What a kernel is compiled for."""

    dtype: torch.dtype
    vectors: int
    aligned: bool
    formats: tuple[Format, ...]

    @property
    def lane_elements(self) -> int:
        """Elements in the 16 bytes that a lane reads at a time."""
        return 16 // self.dtype.itemsize

    @property
    def segment(self) -> int:
        """Channels of a block."""
        return 32 * self.lane_elements * self.vectors

    def source(self) -> str:
        """Return the source with its constants."""
        constants = {
            "DTYPE": _DTYPES[self.dtype],
            "VECTORS": self.vectors,
            "ALIGNED": int(self.aligned),
            "FORMATS": len(self.formats),
            "HALVES": ", ".join(f"{2.0 ** (fmt.bits - 1)}f" for fmt in self.formats) or "0",
            "LANES": ", ".join(
                str((fmt.group_size or 0) // self.lane_elements) for fmt in self.formats
            )
            or "0",
            "SHIFT": _SHIFT,
            "LOWEST": _LOWEST,
            "BINS": _BINS,
            "WARPS": _WARPS,
            "PASSES": _PASSES,
        }
        lines = [f"#define {name} {value}" for name, value in constants.items()]
        return "\n".join([*lines, "#line 1", _SOURCE.read_text()])


def fuses(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether the pass measures this format: integers whose groups lie within a warp."""
    sizes = {16 // dtype.itemsize << i for i in range(6)}
    return fmt.kind == "int" and fmt.granularity == "group" and fmt.group_size in sizes


def available(device: torch.device) -> bool:
    """Whether there is compiled code for the device; the first call warns where there is not."""
    return _usable(device.index or 0)


def passes(
    tensors: Sequence[Tensor], formats: tuple[Format, ...], totals: Sequence[Totals]
) -> list[Tensor]:
    """Do what onepass.passes says, for formats that this code `fuses`."""
    tensors = [x.contiguous() for x in tensors]
    plans: dict[_Plan, list[int]] = {}
    for i, x in enumerate(tensors):
        plan = _plan(x.dtype, x.shape[1], x.data_ptr() % 16 == 0, formats, x.device.index)
        plans.setdefault(plan, []).append(i)
    found: dict[int, Tensor] = {}
    for plan, alike in plans.items():
        for start in range(0, len(alike), _PASSES):
            some = alike[start : start + _PASSES]
            rows = _read(plan, [tensors[i] for i in some], len(formats), [totals[i] for i in some])
            found |= zip(some, rows, strict=True)
    return [found[i] for i in range(len(tensors))]


def _read(
    plan: "_Plan", tensors: Sequence[Tensor], formats: int, totals: Sequence[Totals]
) -> list[Tensor]:
    """Read tensors by one plan, in two launches; return their rows."""
    device = tensors[0].device
    layout = _layout(plan, tuple(x.shape for x in tensors), formats)
    parts = torch.empty(layout.part_bytes, dtype=torch.uint8, device=device)
    found = torch.empty(sum(layout.sizes), dtype=torch.float64, device=device)
    batch = _Batch.from_buffer_copy(layout.batch)
    begin, place = parts.data_ptr(), found.data_ptr()
    for i, x in enumerate(tensors):
        one = batch.passes[i]
        one.x, one.found = x.data_ptr(), place
        one.parts, one.squares_parts, one.absmax_parts = (begin + at for at in layout.offsets[i])
        one.histogram, one.absmax, one.squares, one.counts, one.nonfinite = (
            total.data_ptr() for total in totals[i]
        )
        place += 8 * layout.sizes[i]
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(batch))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _launch(plan.read, layout.readers, 32 * _WARPS, _SHARED_BYTES, stream, pointers)
        _launch(plan.join, layout.joiners, _JOIN_THREADS, 0, stream, pointers)
    columns = [part.view(6 + formats, -1) for part in torch.split(found, layout.sizes)]
    if plan.places is None:
        return [rows.mT for rows in columns]
    # An index would make it wait.
    return [torch.stack([rows[place] for place in plan.places]).mT for rows in columns]


@dataclass(frozen=True)
class _Layout:
    """What a launch takes that the tensors' shapes tell."""

    batch: _Batch
    sizes: list[int]  # of what is found of each tensor, in elements
    offsets: list[tuple[int, int, int]]  # of each tensor's three kinds of parts, in bytes
    part_bytes: int
    readers: int  # blocks of read_tensors
    joiners: int  # blocks of join_parts


@lru_cache(maxsize=1024)
def _layout(plan: "_Plan", shapes: tuple[tuple[int, int], ...], formats: int) -> _Layout:
    record = 6 + formats
    elements = sum(rows * width for rows, width in shapes)
    batch = _Batch(count=len(shapes))
    offsets, end, reader, joiner = [], 0, 0, 0
    for one, (rows, width) in zip(batch.passes, shapes, strict=False):
        segments = -(-width // plan.segment)
        share = plan.blocks * rows * width // elements // segments
        chunks = max(1, min(share, rows // (_WARPS * _ROWS_PER_WARP)))
        row_blocks = -(-_JOINERS * rows // _JOIN_THREADS)
        one.rows, one.width, one.segments, one.chunks = rows, width, segments, chunks
        one.row_blocks, one.first_reader, one.first_joiner = row_blocks, reader, joiner
        # Segments of rows and chunks of channels' squares, in float64, and of extremes, in float32.
        squares = end + 8 * rows * segments * (record + record % 2)
        extremes = squares + 8 * chunks * width
        offsets.append((end, squares, extremes))
        end = extremes + -(-4 * chunks * width // 16) * 16
        reader += segments * chunks
        joiner += row_blocks + -(-_JOINERS * width // _JOIN_THREADS)
    sizes = [record * rows for rows, _ in shapes]
    return _Layout(batch, sizes, offsets, end, reader, joiner)


@dataclass(frozen=True)
class _Plan:
    """How tensors are read for which one kernel on one device does."""

    read: int
    join: int
    segment: int  # channels of a block
    blocks: int  # that run at a time
    places: tuple[int, ...] | None  # of a row's columns, where the kernel's order is another


@cache
def _plan(
    dtype: torch.dtype, width: int, aligned: bool, formats: tuple[Format, ...], index: int
) -> _Plan:
    # By rising group size, as the kernel widens one reduction from each to the next.
    order = sorted(range(len(formats)), key=lambda i: formats[i].group_size or 0)
    variant = _Variant(
        dtype=dtype,
        vectors=_vectors(width, 512 // dtype.itemsize),
        aligned=aligned and width * dtype.itemsize % 16 == 0,
        formats=tuple(formats[i] for i in order),
    )
    read, join = _kernels(variant, index)
    places = (*range(6), *(6 + order.index(i) for i in range(len(order))))
    return _Plan(
        read=read,
        join=join,
        segment=variant.segment,
        blocks=torch.cuda.get_device_properties(index).multi_processor_count,
        places=places if places != tuple(sorted(places)) else None,
    )


def _vectors(width: int, step: int) -> int:
    """Return how many times 16 bytes a lane takes of a row: what pads least, then the most."""

    def padded(vectors: int) -> int:
        return -(-width // (step * vectors)) * vectors

    return min((4, 3, 2, 1), key=lambda vectors: (padded(vectors), -vectors))


@cache
def _usable(index: int) -> bool:
    """Say whether the device and the libraries will do; warn where not."""
    if os.environ.get("BITPLAN_COMPILE") == "0":
        return False
    try:
        if torch.version.hip:
            raise OSError("no NVIDIA device")
        # Not in torch's type stubs.
        properties: Any = torch.cuda.get_device_properties(index)
        shared = properties.shared_memory_per_block_optin
        if shared < _SHARED_BYTES:
            raise OSError(f"blocks get {shared:,} bytes of shared memory, not {_SHARED_BYTES:,}")
        _driver(), _nvrtc()
    except OSError as error:
        _log.warning(
            "statistics on GPU %d run some hundred times slower, in torch operations: %s "
            "(BITPLAN_COMPILE=0 runs them so without this warning)",
            index,
            error,
        )
        return False
    return True


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    word, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernel.argtypes = [pointer, *[word] * 7, pointer, pointer, pointer]
    return driver


@cache
def _nvrtc() -> ctypes.CDLL:
    """Load NVRTC: what torch has loaded or the system has, else from the wheel torch depends on."""
    name = f"libnvrtc.so.{(torch.version.cuda or '0').split('.')[0]}"
    site = Path(torch.__file__).parents[1]
    for candidate in (name, *map(str, sorted(site.glob(f"nvidia/*/lib/{name}")))):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise OSError(f"{name} was found neither in the library path nor beside torch")


@cache
def _kernels(variant: _Variant, index: int) -> tuple[int, int]:
    """Compile a variant for a device, and return its two functions."""
    driver = _driver()
    module = ctypes.c_void_p()
    major, minor = torch.cuda.get_device_capability(index)
    cubin = _cubin(variant, f"sm_{major}{minor}")
    found = []
    with torch.cuda.device(index):
        _check(driver.cuModuleLoadData(ctypes.byref(module), cubin))
    for name in (b"read_tensors", b"join_parts"):
        function = ctypes.c_void_p()
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name))
        found.append(function)
    dynamic_shared_memory = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(found[0], dynamic_shared_memory, _SHARED_BYTES))
    # Or the multiprocessors would divide their memory anew from one kernel to the next.
    shared_carveout = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, a percentage
    _check(driver.cuFuncSetAttribute(found[1], shared_carveout, 100))
    read, join = (function.value or 0 for function in found)
    return read, join


def _cubin(variant: _Variant, architecture: str) -> bytes:
    """Compile a variant; raises RuntimeError with the compiler's log."""
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = variant.source().encode()
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    array = (ctypes.c_char_p * len(options))(*options)
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source, _SOURCE.name.encode(), 0, None, None
    )
    if created or nvrtc.nvrtcCompileProgram(program, len(options), array):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{_SOURCE.name} does not compile for {variant}: {log.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def _launch(
    function: int,
    blocks: int,
    threads: int,
    shared_bytes: int,
    stream: int,
    pointers: "ctypes.Array[ctypes.c_void_p]",
) -> None:
    _check(
        _driver().cuLaunchKernel(
            function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, pointers, None
        )
    )


def _check(result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'error').decode()}")
