"""How much memory a model may take: what the machine, its container or the device has free."""

import ctypes
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes free on a device, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            return free if (left := _cgroup_bytes()) is None else min(free, left)
    return None


def release() -> None:
    """Give the system back what was freed, where the C library can (glibc).

    Its allocator keeps freed tensors of a few megabytes for later, scattered between those in use:
    over the batches of a profile that grows to gigabytes.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _cgroup_bytes() -> int | None:
    """Return what the container's limit leaves, None where there is none."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cache = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Pages of files go when memory is wanted.
    return None if limit == "max" else int(limit) - used + int(cache.get("inactive_file", 0))
