"""The processes of a launch: the first one is bitplan, the others train with it.

`accelerate launch -m bitplan verify RUN` and torchrun start a command several times. The first of
the processes runs it as if it were alone: it reads, locks, writes and prints. The others wait for
what it shares with them, which is a training that all run together, and end as it ends. A training
of theirs is one of Accelerate's (train.py); what is shared travels over a channel of its own.

An error that the first process meets between trainings is told to the others. One that a process
meets within a training is its own: the others wait for it in vain, until the launcher ends them.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bitplan import progress
from bitplan.errors import BitplanError, FirstProcessError
from bitplan.qat.train import make_accelerator

PATIENCE = timedelta(days=30)
"""How long the others wait for the first process; a launcher ends them sooner if it dies."""

T = TypeVar("T")
_channel: dist.ProcessGroup | None = None
_is_sharing = False


def is_launched() -> bool:
    """Whether a launcher started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def together(lead: Callable[[], T], device: torch.device) -> T:
    """Call `lead` in the first process of a launch; the others do what it shares.

    Returns the result in all of them. The others raise FirstProcessError for an error of `lead`.
    Once a process; where nothing was launched, it is a call of `lead`.
    """
    if not is_launched():
        return lead()
    # Every process reads the checkpoint itself, as bitplan checks what it has read.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = make_accelerator(device)
    _open()
    if not accelerator.is_main_process:
        progress.silence()
        result: T = _follow()
    else:
        try:
            result = lead()
        except BitplanError as error:
            if not _is_sharing:
                _tell("error", str(error))
                _part()
            raise
        _tell("result", result)
        _part()
    accelerator.end_training()
    return result


def share(work: Callable[..., T], *arguments: Any) -> T:
    """Call `work` in all processes of the launch, and return what it does in this one.

    For the first process, within `together`. `work` and its arguments must pickle.
    """
    global _is_sharing
    if _channel is None:
        return work(*arguments)
    _tell("work", (work, arguments))
    _is_sharing = True
    result = work(*arguments)
    _is_sharing = False
    return result


def _open() -> None:
    global _channel
    _channel = dist.new_group(backend="gloo", timeout=PATIENCE)


def _tell(kind: str, value: Any) -> None:
    dist.broadcast_object_list([kind, value], src=0, group=_channel, device=torch.device("cpu"))


def _part() -> None:
    """Wait until all have heard the last message: a process that ends cuts the others' channel."""
    dist.barrier(group=_channel)


def _follow() -> Any:
    while True:
        message: list[Any] = [None, None]
        dist.broadcast_object_list(message, src=0, group=_channel, device=torch.device("cpu"))
        kind, value = message
        if kind == "work":
            work, arguments = value
            work(*arguments)
        elif kind == "error":
            _part()
            raise FirstProcessError(value)
        else:
            _part()
            return value
