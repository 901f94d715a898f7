"""A checkpoint, or a running training, to statistics, format errors and sensitivity.

    from bitplan.probe import Recorder, RecorderCallback, stats

The names below are loaded when first used: importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitplan.probe.callback import RecorderCallback
    from bitplan.probe.lightning import LightningRecorderCallback
    from bitplan.probe.recorder import Recorder
    from bitplan.probe.tensor_stats import TensorStats, stats
    from bitplan.probe.writers import TensorBoardWriter, WandbWriter

__all__ = [
    "LightningRecorderCallback",
    "Recorder",
    "RecorderCallback",
    "TensorBoardWriter",
    "TensorStats",
    "WandbWriter",
    "stats",
]

_MODULES = {
    "LightningRecorderCallback": "lightning",
    "Recorder": "recorder",
    "RecorderCallback": "callback",
    "TensorBoardWriter": "writers",
    "TensorStats": "tensor_stats",
    "WandbWriter": "writers",
    "stats": "tensor_stats",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
