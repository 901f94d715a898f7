"""On which devices arms are trained, and how many side by side.

Arms are independent, so several GPUs train several arms, each as it would be alone: their losses do
not depend on how many there are. Several on one device are for models too small to fill it; on a
CPU they bring nothing (benchmarks/LOG.md), so that is left to --workers. A launch of several
processes trains one arm at a time with all of them (processes.py).
"""

import torch

from bitplan.errors import BitplanError
from bitplan.options import VerifyOptions
from bitplan.qat.processes import is_launched


def training_devices(options: VerifyOptions, device: torch.device) -> list[str]:
    """Return the device of every process that trains, some perhaps named several times.

    Raises BitplanError for more GPUs than there are, for --gpus beside another device, and for what
    a launch decides already.
    """
    if is_launched():
        for flag, value in (("--gpus", options.gpus), ("--workers", options.workers)):
            if value is not None:
                raise BitplanError(f"{flag} {value}: the launcher says how many processes train")
        if device.index is not None:
            raise BitplanError(f"--device {device}: each process of a launch has a GPU of its own")
    devices = [str(device)]
    if options.gpus is not None:
        if device.type != "cuda" or device.index is not None:
            raise BitplanError(f"--gpus {options.gpus} is for CUDA, and the device is {device}")
        if options.gpus > torch.cuda.device_count():
            raise BitplanError(f"--gpus {options.gpus}: torch sees {torch.cuda.device_count()}")
        devices = [f"cuda:{index}" for index in range(options.gpus)]
    return devices * (options.workers or 1)
