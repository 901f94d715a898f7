"""On which devices arms are trained, and how many side by side.

Arms are independent, so several GPUs train several arms, each as it would be alone: their losses do
not depend on how many there are. On a CPU small trainings run side by side with a share of the
threads each, since one thread each wastes less than many on one small matrix; on a GPU that is
asked for with --workers. Unasked, nothing runs side by side that would take under a minute, or
more than half of the memory that is free.
"""

from collections.abc import Sequence

import torch

from bitplan.errors import BitplanError
from bitplan.options import VerifyOptions
from bitplan.probe.memory import available_bytes
from bitplan.qat.start import Start
from bitplan.qat.train import Job

# Rough figures, to tell seconds from minutes and megabytes from gigabytes.
CPU_FLOPS = 3e10
FLOPS_PER_PARAMETER = 6
BYTES_PER_PARAMETER = 24
"""Weights twice (start and arm), gradients, two moments, and one more for activations."""
SHORT_S = 60


def training_devices(
    options: VerifyOptions, device: torch.device, jobs: Sequence[Job], start: Start
) -> list[str]:
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
    if options.workers is not None:
        return devices * options.workers
    return devices * (_side_by_side(device, jobs, start) if device.type == "cpu" else 1)


def _side_by_side(device: torch.device, jobs: Sequence[Job], start: Start) -> int:
    """Return how many trainings a CPU takes at once."""
    params = sum(p.numel() for p in start.model(jobs[0].seed).parameters())
    seconds = FLOPS_PER_PARAMETER * params * sum(job.train.numel() for job in jobs) / CPU_FLOPS
    if seconds < SHORT_S:
        return 1
    fitting = (available_bytes(device) or 0) // 2 // (BYTES_PER_PARAMETER * params)
    return max(1, min(torch.get_num_threads(), len(jobs), fitting))
