"""On which devices arms are trained, and how many side by side.

Arms are independent, so several GPUs train several arms, each as it would be alone: their losses do
not depend on how many there are. Several on one device are for models too small to fill it; on a
CPU they bring nothing (benchmarks/LOG.md), so that is left to --workers.
"""

import torch

from bitplan.errors import BitplanError
from bitplan.options import VerifyOptions


def training_devices(options: VerifyOptions, device: torch.device) -> list[str]:
    """Return the device of every process that trains, some perhaps named several times.

    Raises BitplanError for more GPUs than there are, and for --gpus beside another device.
    """
    devices = [str(device)]
    if options.gpus is not None:
        if device.type != "cuda" or device.index is not None:
            raise BitplanError(f"--gpus {options.gpus} is for CUDA, and the device is {device}")
        if options.gpus > torch.cuda.device_count():
            raise BitplanError(f"--gpus {options.gpus}: torch sees {torch.cuda.device_count()}")
        devices = [f"cuda:{index}" for index in range(options.gpus)]
    return devices * (options.workers or 1)
