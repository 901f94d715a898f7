"""Inputs: calibration tokens through the model under nnsight, a batch at a time.

Each linear's input goes into a streaming statistic as it is computed, and, where sensitivity is
asked for, the same pass is run backward, twice (sensitivity.py). Linears that are handed one tensor
(q/k/v; gate and up) share its statistics. Nothing of a batch outlives it, so memory does not grow
with tokens; batches are as large as a bound on activations allows.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitplan.errors import CheckpointError
from bitplan.formats import Format
from bitplan.probe.checkpoint import some
from bitplan.probe.experts import Expert
from bitplan.probe.memory import release
from bitplan.probe.modules import LinearModule
from bitplan.probe.outliers import OutlierWatch
from bitplan.probe.sensitivity import ROLES, GradientSensitivity, Rows, summed_loss
from bitplan.probe.tensor_stats import TensorStats
from bitplan.probe.trace import traced
from bitplan.progress import track

# Tensors remembered to recognize the next reader of the same one; readers follow closely.
_RECENT = 8
_BATCH_BYTES = {"cpu": 1 << 30}
_GPU_BATCH_BYTES = 1 << 33


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the inputs showed: statistics by module, outliers, sensitivity, loss (nats per token).

    A module that no token reached is not in `stats`; modules that share an input share the object.
    """

    stats: dict[str, TensorStats]
    outliers: OutlierWatch
    sensitivity: list[dict[str, Any]] | None
    loss: float | None
    notes: tuple[str, ...]


def measure_inputs(
    model: nn.Module,
    items: Sequence[LinearModule],
    ids: Tensor,
    formats: Sequence[Format],
    *,
    has_loss: bool,
    sensitivity: bool,
) -> Inputs:
    """Run token ids [sequences, tokens] through a model and measure the inputs of its linears.

    Without a loss there is no sensitivity. Raises CheckpointError where the loss is not finite.
    """
    device = next(model.parameters()).device
    estimate = (
        GradientSensitivity(formats, sequences=len(ids), seq_len=ids.shape[1], device=device)
        if sensitivity and has_loss
        else None
    )
    watcher = InputWatcher(model, items, formats, estimate)
    names = [item.linear.module for item in items]
    loss = torch.zeros((), dtype=torch.float64, device=device)
    starts = range(0, len(ids), size := batch_size(items, ids.shape[1], device))
    with (
        traced(model, names, every_pass=watcher.order_varies) as tracer,
        watcher.outliers.hooked(model),
        _frozen(model),
    ):
        for start in track(starts, "profiling inputs"):
            batch = ids[start : start + size].to(device)
            watcher.begin(batch, start)
            with torch.set_grad_enabled(estimate is not None):
                output = tracer.run(batch, watcher)
            if estimate is not None:
                loss += estimate.backward(output.logits, batch, start)
            elif has_loss:
                loss += summed_loss(output.logits, batch)
            watcher.end()
            del output
            if device.type == "cpu":
                release()
    predicted = len(ids) * (ids.shape[1] - 1)
    return Inputs(
        stats={name: stats for name, stats in watcher.stats.items() if stats.rows},
        outliers=watcher.outliers,
        sensitivity=list(estimate.rows(items)) if estimate is not None else None,
        loss=finite_loss(loss.item() / predicted) if has_loss else None,
        notes=tuple(repeated_note(tracer.repeated)),
    )


def repeated_note(names: Sequence[str]) -> Iterator[str]:
    """Say of linears that run again in a pass, if any do, what is measured of them."""
    if names:
        yield (
            f"{len(names)} linears run more than once in a pass, {some(names)}: their statistics "
            "are those of the first run"
        )


def finite_loss(loss: float) -> float:
    """Return the loss; raise CheckpointError where it is NaN or infinite."""
    if not math.isfinite(loss):
        raise CheckpointError(f"the loss on the calibration text is {loss}: the model is damaged")
    return loss


def batch_size(items: Sequence[LinearModule], seq_len: int, device: torch.device) -> int:
    """Return how many sequences keep the activations of a batch within the bound, at least 1."""
    # A linear's input and output, what lies between it and the next as often again, and the
    # gradients that wait for the next pass.
    floats = sum(3 * (i.linear.in_features + i.linear.out_features) for i in items if i.has_input)
    bound = _BATCH_BYTES.get(device.type, _GPU_BATCH_BYTES)
    return max(1, bound // max(1, 4 * floats * seq_len))


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient in the block: only activations do."""
    required = [p for p in model.parameters() if p.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


@dataclass
class _Seen:
    """A tensor of this batch, the linear that read it first, and each row's place in the text."""

    x: Tensor
    leader: str
    rows: Rows
    views: dict[str, tuple[str, Tensor]] = field(default_factory=dict)


class InputWatcher:
    """Updates statistics and sensitivity with every tensor a trace shows.

    Without `measures` it is the sensitivity alone, of a pass whose statistics are known.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[LinearModule],
        formats: Sequence[Format],
        estimate: GradientSensitivity | None,
        *,
        measures: bool = True,
    ) -> None:
        self.stats: dict[str, TensorStats] = {}
        self.outliers = OutlierWatch(items)
        self._items = {item.linear.module: item for item in items}
        self._formats = tuple(formats)
        self._estimate = estimate
        self._measures = measures
        self._experts = {
            f"{name}.{child}": module
            for name, module in model.named_modules()
            if isinstance(module, Expert)
            for child, _ in module.named_children()
        }
        self._recent: deque[_Seen] = deque(maxlen=_RECENT)
        self._reading: _Seen | None = None

    @property
    def order_varies(self) -> bool:
        """Whether the tokens decide which modules run: experts that are skipped when unused."""
        return any(
            item.linear.expert is not None and name not in self._experts
            for name, item in self._items.items()
        )

    def begin(self, batch: Tensor, start: int) -> None:
        """Take note of a batch of ids [sequences, tokens], the first of them number `start`."""
        rows = torch.arange(batch.numel(), device=batch.device)
        self._positions = rows % batch.shape[1]
        self._sequences = rows // batch.shape[1] + start
        self.outliers.begin(batch, start)

    def end(self) -> None:
        """Let go of the batch."""
        self._recent.clear()
        self._reading = None

    def on_input(self, name: str, x: Tensor) -> Tensor | None:
        """Take in a linear's input; return the view it must read where gradients are wanted."""
        item = self._items[name]
        self._reading = None
        if not item.has_input:
            return None
        seen = self._reading = self._find(x) or self._first(name, x)
        if self._measures:
            self.stats[name] = self.stats[seen.leader]
            self.outliers.share(name, seen.leader)
        if self._estimate is None or item.linear.role not in ROLES or not x.requires_grad:
            return None
        group = item.linear.fused or name
        if group not in seen.views:
            seen.views[group] = name, self._estimate.input(name, x, seen.rows)
        leader, view = seen.views[group]
        self._estimate.share(name, leader)
        return view

    def on_output(self, name: str, y: Tensor) -> None:
        """Take in a linear's output; embeddings are where gradients begin."""
        item, seen = self._items[name], self._reading
        if seen is not None and self._measures:
            self.outliers.see_output(name, seen.x, y, seen.rows.sequences, seen.rows.positions)
        if self._estimate is None:
            return
        if seen is None:
            if not y.requires_grad:
                y.requires_grad_(True)
        elif item.linear.role in ROLES and y.requires_grad:
            self._estimate.output(item, seen.x, y, seen.rows)

    def _find(self, x: Tensor) -> _Seen | None:
        return next((seen for seen in self._recent if seen.x is x), None)

    def _first(self, name: str, x: Tensor) -> _Seen:
        """Update the statistics with a tensor that was not seen before in this batch."""
        rows = self._places(name, x)
        if self._measures:
            self.outliers.see_input(name, x, rows.sequences, rows.positions)
            if name not in self.stats:
                self.stats[name] = TensorStats(
                    x.shape[-1], operand="input", formats=self._formats, device=x.device
                )
            self.stats[name].update(
                x,
                positions=rows.positions,
                sequences=rows.sequences if rows.positions is not None else None,
            )
        seen = _Seen(x, name, rows)
        self._recent.append(seen)
        return seen

    def _places(self, name: str, x: Tensor) -> Rows:
        """Return where each row belongs."""
        rows = x.numel() // x.shape[-1]
        if (expert := self._experts.get(name)) is not None and expert.tokens is not None:
            tokens = expert.tokens
            return Rows(self._sequences[tokens], self._positions[tokens], whole=False)
        if rows == self._positions.numel():
            return Rows(self._sequences, self._positions, whole=True)
        # Rows in no known order: their share of each sequence is lost, not their sum.
        return Rows(self._sequences[:1].expand(rows), None, whole=False)
