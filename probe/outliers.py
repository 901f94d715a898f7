"""Where outliers are, gathered while the inputs are measured: channels, hidden states, weights.

An `OutlierWatch` sees what the pass over the calibration text computes anyway. Inputs and outputs
of linears are handed to it; hidden states, which no linear reads (a norm stands between), it sees
by a hook on every block. A block that runs several times in a pass counts once.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from bitplan.findings import MASSIVE, SUPER_WEIGHT
from bitplan.probe.channels import ChannelStability
from bitplan.probe.checkpoint import some
from bitplan.probe.massive import MassiveActivations, OutputSpike
from bitplan.probe.modules import LinearModule
from bitplan.probe.tensor_stats import fetch

_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.)")


class OutlierWatch:
    """Channel stability of every input, massive values after every block, spikes of every fc2."""

    def __init__(self, items: Sequence[LinearModule]) -> None:
        self._items = {item.linear.module: item for item in items}
        self._blocks: dict[str, int] = {}
        for item in items:
            if item.linear.block is not None and (path := _BLOCK.match(item.linear.module)):
                self._blocks[path[0]] = item.linear.block
        self._channels: dict[str, ChannelStability] = {}
        self._hidden: dict[str, MassiveActivations] = {}
        self._spikes: dict[str, OutputSpike] = {}
        self._unread: set[str] = set()
        self._shape = (0, 0)
        self._first = 0
        self._due: set[str] | None = None

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """See the output of the model's blocks inside the `with`."""
        handles = [
            model.get_submodule(name).register_forward_hook(partial(self._see_block, name))
            for name in self._blocks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, batch: Tensor, first: int) -> None:
        """Take note of a batch of ids [sequences, tokens], the first of them number `first`."""
        self._shape = (batch.shape[0], batch.shape[1])
        self._first = first
        # A pass that only finds out the order of the modules shows no input: it is not counted.
        self._due = None

    def see_input(self, name: str, x: Tensor, sequences: Tensor, positions: Tensor | None) -> None:
        """Take in a linear's input; sequences, positions: of each row, positions where known."""
        if self._due is None:
            self._due = set(self._blocks)
        if name not in self._channels:
            self._channels[name] = ChannelStability(x.shape[-1], x.device)
        if (whole := self._whole(x)) is not None:
            self._channels[name].update(whole)
        elif positions is not None:
            self._channels[name].update(x, sequences - self._first, num_sequences=self._shape[0])

    def share(self, name: str, leader: str) -> None:
        """Note that the linear `name` was handed the input seen as that of `leader`."""
        self._channels[name] = self._channels[leader]

    def see_output(
        self, name: str, x: Tensor, y: Tensor, sequences: Tensor, positions: Tensor | None
    ) -> None:
        """Take in a linear's output y, computed from x."""
        if self._items[name].linear.role != "fc2":
            return
        if name not in self._spikes:
            self._spikes[name] = OutputSpike(x.shape[-1], x.device)
        whole = self._whole(y)
        # The rows of an expert come from many sequences: their common median stands for each's.
        rows = y.reshape(1, -1, y.shape[-1]) if whole is None else whole
        self._spikes[name].update(x, rows, sequences, positions)

    def _see_block(self, name: str, module: nn.Module, args: object, output: Any) -> None:
        if self._due is None or name not in self._due:
            return
        self._due.remove(name)
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != self._shape:
            self._unread.add(name)
            return
        if name not in self._hidden:
            self._hidden[name] = MassiveActivations(hidden.shape[-1], hidden.device)
        self._hidden[name].update(hidden, self._first)

    def _whole(self, x: Tensor) -> Tensor | None:
        """Return rows as [sequences, tokens, channels] of the batch; None where they are not."""
        sequences, tokens = self._shape
        if x.numel() != sequences * tokens * x.shape[-1]:
            return None
        return x.reshape(sequences, tokens, x.shape[-1])

    @property
    def unread(self) -> list[str]:
        """Blocks after which massive activations were not looked for."""
        return sorted(self._unread)

    def channels(self) -> dict[str, Tensor]:
        """Return, on the host, the counts of each input that was seen (channels.py)."""
        states = {id(state): state for state in self._channels.values()}
        counts = fetch([state.counts() for state in states.values()])
        on_host = dict(zip(states, counts, strict=True))
        return {name: on_host[id(state)] for name, state in self._channels.items()}

    def findings(self, input_medians: Mapping[str, float | None]) -> Iterator[dict[str, Any]]:
        """Yield the rows of tables.OUTLIERS; input_medians: median |x| of each linear's input."""
        spiked = [(name, spike) for name, spike in self._spikes.items()]
        vectors = [state.vector() for state in self._hidden.values()]
        vectors += [spike.vector(self._items[name].weight()) for name, spike in spiked]
        found = iter(fetch(vectors))
        for name, vector in zip(self._hidden, found, strict=False):
            place = {"kind": MASSIVE, "module": name, "block": self._blocks[name]}
            yield from (place | finding for finding in MassiveActivations.findings(vector))
        for (name, _), vector in zip(spiked, found, strict=True):
            linear = self._items[name].linear
            place = {
                "kind": SUPER_WEIGHT,
                "module": name,
                "block": linear.block,
                "expert": linear.expert,
            }
            median = input_medians.get(name)
            yield from (place | finding for finding in OutputSpike.findings(vector, median))


def unread_note(blocks: Sequence[str]) -> Iterator[str]:
    """Say of blocks, if there are any, that nothing massive was looked for after them."""
    if blocks:
        yield (
            f"massive activations were not looked for after {some(list(blocks))}: the output is no "
            "hidden state of sequences and tokens"
        )
