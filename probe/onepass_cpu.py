"""The one pass on a CPU: onepass.c, compiled once by the machine's C compiler and kept.

The compiler is $CC, else cc, gcc or clang. The library lies in the user's cache
($BITPLAN_CACHE, else $XDG_CACHE_HOME/bitplan, else ~/.cache/bitplan) under a name made of the
source, the command and the processor, since it is built for the very processor. Without a compiler
or a place to write to, a warning says so once and onepass.py falls back on torch operations, some
five times slower. BITPLAN_COMPILE=0 asks for that, without a warning.

torch.compile of those is four times slower, needs a C++ compiler as well, and compiles anew for
each number of features (benchmarks/LOG.md).
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitplan.formats import Format
from bitplan.probe.cache import cache_dir
from bitplan.probe.histogram import _BINS, _LOWEST, _SHIFT
from bitplan.probe.totals import Totals

_SOURCE = Path(__file__).with_name("onepass.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_LINK = ("-shared", "-fPIC", "-pthread", "-lm")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_THREAD_ELEMENTS = 1 << 17  # fewer are not worth a thread and a histogram of its own

_log = logging.getLogger(__name__)


class _Pass(ctypes.Structure):
    """The struct of the same name, but for the underscore, in onepass.c."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "width", "dtype", "formats")),
        *((name, ctypes.c_void_p) for name in ("group", "half", "found", *Totals._fields)),
        *((name, ctypes.c_int64) for name in ("shift", "lowest", "bins")),
    ]


def fuses(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether the pass measures this format: integers with scales inside a row."""
    return fmt.kind == "int" and fmt.granularity != "tensor"


def available(device: torch.device) -> bool:
    """Whether there is compiled code; the first call compiles it, or warns."""
    return _library() is not None


def passes(
    tensors: Sequence[Tensor], formats: Sequence[Format], totals: Sequence[Totals]
) -> list[Tensor]:
    """Do what onepass.passes says, for formats that this code `fuses`."""
    return [_read(x.contiguous(), formats, total) for x, total in zip(tensors, totals, strict=True)]


def _read(x: Tensor, formats: Sequence[Format], totals: Totals) -> Tensor:
    rows, width = x.shape
    threads = max(1, min(torch.get_num_threads(), x.numel() // _THREAD_ELEMENTS, rows))
    # Nothing here runs in threads of torch's that would go on to spin beside those of the pass.
    found = torch.empty(rows, 6 + len(formats), dtype=torch.float64)
    groups = torch.tensor([fmt.group_size or width for fmt in formats], dtype=torch.int64)
    halves = torch.tensor([2.0 ** (fmt.bits - 1) for fmt in formats])
    arguments = _Pass(
        x.data_ptr(),
        rows,
        width,
        _DTYPES[x.dtype],
        len(formats),
        groups.data_ptr(),
        halves.data_ptr(),
        found.data_ptr(),
        *(total.data_ptr() for total in totals),
        _SHIFT,
        _LOWEST,
        _BINS,
    )
    library = _library()
    assert library is not None, "ask `available` first"
    if library.bitplan_one_pass(ctypes.byref(arguments), ctypes.c_int64(threads)):
        raise MemoryError(f"no memory for rows of {width} elements")
    return found


@cache
def _library() -> ctypes.CDLL | None:
    """Load the compiled code, compiling it where no one has; None, with a warning, without it."""
    if os.environ.get("BITPLAN_COMPILE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning(
            "statistics on the CPU run some five times slower, uncompiled: %s (BITPLAN_COMPILE=0 "
            "runs them so without this warning)",
            error,
        )
        return None


def _compiled() -> Path:
    """Return the library's path; raises OSError or SubprocessError where it cannot be made."""
    command = _compiler()
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + repr((command, _FLAGS, _processor())).encode()).hexdigest()
    path = cache_dir() / f"onepass-{key[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: a process beside this one must never load half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run(
            [*command, *_FLAGS, str(_SOURCE), "-o", str(made), *_LINK],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise OSError(f"{shlex.join(command)} failed: {lines[0]}")
        made.replace(path)
    return path


def _compiler() -> list[str]:
    """Return the command of the C compiler; raises OSError where there is none."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise OSError("no C compiler was found: install one, or name it in CC")


def _processor() -> str:
    """Return what tells processors apart that run different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("flags", "Features", "model name")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))
