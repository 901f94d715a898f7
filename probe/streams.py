"""One set of statistics for linears that are handed the same tensors: q/k/v, gate and up.

Linears of one group share their input by the meaning of sites.Linear.fused, and it is checked: the
first of them to be called reads the tensor, the others must follow with that very tensor. One that
does not (cross-attention; a forward pass that failed half way) gets statistics of its own from then
on. Where it had followed before within the same step, its share of the common statistics can no
longer be told apart: that step is left out for it, with a warning.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitplan.probe.observe import as_multiplied
from bitplan.probe.tensor_stats import TensorStats
from bitplan.sites import Linear


@dataclass
class _Stream:
    """Statistics, and how many of the tensors seen each of the linears was handed."""

    taken: dict[int, int] = field(default_factory=dict)
    calls: int = 0
    stats: TensorStats | None = None
    latest: "_Seen | None" = None
    lost: set[int] = field(default_factory=set)


class _Seen:
    """A tensor that was seen, told from others without keeping it alive."""

    def __init__(self, x: Tensor) -> None:
        self._ref, self._version, self._place = weakref.ref(x), _version(x), _place(x)

    def is_of(self, x: Tensor, traced: bool) -> bool:
        """Whether `x` is the tensor, unchanged.

        Compiled code hands over one tensor as several views, and different tensors in one object
        whose memory it uses again; within a group equal memory is an equal tensor.
        """
        if traced:
            return self._place == _place(x)
        return self._ref() is x and self._version == _version(x)


class Streams:
    """The statistics of the inputs of linears, each named by its index."""

    def __init__(
        self, linears: Sequence[Linear], make: Callable[[Linear, torch.device], TensorStats]
    ) -> None:
        groups = [(linear.fused or linear.module, linear.in_features) for linear in linears]
        streams = {group: _Stream() for group in groups}
        self._streams = [streams[group] for group in groups]
        for index, stream in enumerate(self._streams):
            stream.taken[index] = 0
        self._linears = linears
        self._make = make

    def see(self, index: int, x: Tensor, traced: bool) -> None:
        """Take in the input of one call of linear `index`."""
        stream = self._streams[index]
        if (
            stream.latest is not None
            and stream.taken[index] == stream.calls - 1
            and stream.latest.is_of(x, traced)
        ):
            stream.taken[index] += 1
            return
        if len(stream.taken) > 1:
            self._split(stream)
            stream = self._streams[index]
        if stream.stats is None or (stream.calls == 0 and stream.stats.device != x.device):
            stream.stats = self._make(self._linears[index], x.device)
        stream.stats.update(x if traced else as_multiplied(x))
        stream.calls += 1
        stream.taken[index] += 1
        if len(stream.taken) > 1:
            stream.latest = _Seen(x)

    def step(self) -> list[TensorStats | None]:
        """Return the statistics since the last step, None for a linear never called.

        They are those of the streams: read them before the next call, which `reset` starts over.
        """
        for stream in {id(stream): stream for stream in self._streams}.values():
            self._split(stream)
        found = []
        for index, stream in enumerate(self._streams):
            known = stream.calls > 0 and index not in stream.lost
            found.append(stream.stats if known else None)
        for stream in self._streams:
            if stream.lost:
                stream.stats = None  # it is not among those that are returned and reset
            stream.calls, stream.latest = 0, None
            stream.taken = dict.fromkeys(stream.taken, 0)
            stream.lost.clear()
        return found

    def _split(self, stream: _Stream) -> None:
        """Part from a stream the linears that were not handed all of its tensors."""
        for index in [i for i, taken in stream.taken.items() if taken != stream.calls]:
            taken = stream.taken.pop(index)
            own = self._streams[index] = _Stream(taken={index: 0})
            if taken:
                own.lost.add(index)
                linear = self._linears[index]
                warnings.warn(
                    f"{linear.module} was handed the input of {linear.fused} in some forward "
                    "passes of a step only: its input is not recorded there",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _version(x: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where torch does not count."""
    return None if x.is_inference() else x._version


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype
