"""A checkpoint, or a running training, to statistics, format errors and sensitivity.

    from bitplan.probe import Recorder, RecorderCallback, tensor_stats

The names below are loaded when first used: importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitplan.probe.callback import RecorderCallback
    from bitplan.probe.recorder import Recorder
    from bitplan.probe.stats import TensorStats, tensor_stats

__all__ = ["Recorder", "RecorderCallback", "TensorStats", "tensor_stats"]

_MODULES = {
    "Recorder": "recorder",
    "RecorderCallback": "callback",
    "TensorStats": "stats",
    "tensor_stats": "stats",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
