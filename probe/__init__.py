"""A checkpoint, or a running training, to statistics, format errors and sensitivity.

    from bitplan.probe import Recorder, RecorderCallback, tensor_stats

The names below are loaded when first used: importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitplan.probe.callback import RecorderCallback
    from bitplan.probe.lightning import LightningRecorderCallback
    from bitplan.probe.recorder import Recorder
    from bitplan.probe.stats import TensorStats, tensor_stats
    from bitplan.probe.writers import TensorBoardWriter, WandbWriter

__all__ = [
    "LightningRecorderCallback",
    "Recorder",
    "RecorderCallback",
    "TensorBoardWriter",
    "TensorStats",
    "WandbWriter",
    "tensor_stats",
]

_MODULES = {
    "LightningRecorderCallback": "lightning",
    "Recorder": "recorder",
    "RecorderCallback": "callback",
    "TensorBoardWriter": "writers",
    "TensorStats": "stats",
    "WandbWriter": "writers",
    "tensor_stats": "stats",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
