"""Statistics during training: hooks in a `with` block around a user's own loop.

    with Recorder(model, every=50, formats=("int4-g128",)) as recorder:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    recorder.frame().write_parquet("stats.parquet")

`step` marks the end of an optimizer step; with `optimizer=` it is called by that optimizer's own
`step`. Steps k, 2k, ... are recorded: the inputs of all forward passes since the step before (so
gradient accumulation counts every micro-batch), and the weights after the update.

Inputs count only while `model` itself runs forward in training mode: evaluation is not recorded,
and a layer that gradient checkpointing runs again during the backward pass is not counted twice.
Linears handed the same tensor (q/k/v; gate/up) share one computation. Nothing waits for the device
until `frame`, `errors_frame` or `flush` brings all that was recorded to the host in one transfer.
Under torch.compile give the plain model; every linear then breaks the graph.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import polars as pl
import torch
from torch import Tensor, nn

from bitplan.errors import CheckpointError
from bitplan.formats import Format, Operand, parse_format
from bitplan.probe.modules import LinearModule, find_linears
from bitplan.probe.stats import Summary, TensorStats, fetch
from bitplan.probe.weights import gate_up_alignment, gate_up_partners
from bitplan.sites import OPERANDS, Linear, site_columns
from bitplan.tables import ERRORS, PROFILE


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What was recorded of one site at one step, still on the device."""

    linear: Linear
    operand: Operand
    step: int
    summary: Summary
    extras: dict[str, Tensor] = field(default_factory=dict)


class _Chunk:
    """The statistics of one tensor, shared by the linears that are handed it one after another."""

    def __init__(self, x: Tensor, stats: TensorStats) -> None:
        self._tensor, self._version = weakref.ref(x), _version(x)
        self._stats = stats
        self._joined: tuple[TensorStats, TensorStats] | None = None

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is the very tensor these statistics are of, unchanged."""
        return self._tensor() is x and self._version == _version(x)

    def after(self, before: TensorStats | None) -> TensorStats:
        """Return the statistics of what came before and of this; shared where that is shared."""
        if before is None:
            return self._stats
        if self._joined is None or self._joined[0] is not before:
            self._joined = (before, before.joined(self._stats))
        return self._joined[1]


class Recorder:
    """Records statistics of weights and inputs at every `every`-th optimizer step.

    formats: formats, or their names, whose quantization error is recorded as well. sites: operands.
    evaluation: count forward passes in evaluation mode too; `step` still says when to record.
    optimizer: calls `step` by itself. drift: keep a copy of the weights, made on entry, and record
    how far they moved. start: optimizer steps already taken, for a training that resumes.
    Raises CheckpointError on entry where the model has no linear.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        formats: Sequence[Format | str] = (),
        sites: Sequence[Operand] = OPERANDS,
        *,
        evaluation: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        drift: bool = False,
        start: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: record every 1st step or fewer")
        self.model = model
        self.every = every
        self.formats = tuple(parse_format(f) if isinstance(f, str) else f for f in formats)
        self.sites = tuple(sites)
        self.optimizer = optimizer
        self.steps = start
        self._evaluation = evaluation
        self._drift = drift
        self.start = start
        self._handles: list[Any] = []
        self._linears: list[LinearModule] = []
        self._initial: dict[str, Tensor] = {}
        self._partners: dict[str, str] = {}
        self._active = False
        self._inputs: dict[str, TensorStats] = {}
        self._latest: _Chunk | None = None
        self._pending: list[_Record] = []
        self._rows: list[dict[str, Any]] = []
        self._errors: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._linears = find_linears(self.model)
        if not self._linears:
            raise CheckpointError("nothing to record: the model has no linear")
        self._partners = gate_up_partners(
            [item.linear for item in self._linears],
            getattr(getattr(self.model, "config", None), "model_type", None),
        )
        if self._drift:
            self._initial = {
                item.linear.module: item.weight().detach().clone() for item in self._linears
            }
        if "input" in self.sites:
            self._handles += [
                self.model.register_forward_pre_hook(_untraced(self._begin)),
                self.model.register_forward_hook(_untraced(self._end), always_call=True),
            ]
            for item in self._linears:
                if item.has_input:
                    hook = _untraced(partial(self._see_input, item.linear))
                    self._handles.append(
                        item.module.register_forward_pre_hook(hook, with_kwargs=True)
                    )
        if self.optimizer is not None:
            self._handles.append(self.optimizer.register_step_post_hook(self._after_optimizer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()
        self._latest = None
        self._initial.clear()
        self._active = False

    def step(self) -> None:
        """Mark the end of an optimizer step; record it if it is one of every `every`."""
        self.steps += 1
        if self.steps % self.every:
            return
        if "weight" in self.sites:
            self._pending += [self._record_weight(item) for item in self._linears]
        summaries = {id(seen): seen.summary() for seen in self._inputs.values()}
        self._pending += [
            _Record(
                linear=item.linear,
                operand="input",
                step=self.steps,
                summary=summaries[id(self._inputs[item.linear.module])],
            )
            for item in self._linears
            if item.linear.module in self._inputs
        ]
        self._inputs.clear()

    def frame(self) -> pl.DataFrame:
        """Return what was recorded so far, with the columns of tables.PROFILE."""
        self.flush()
        return PROFILE.frame(self._rows)

    def errors_frame(self) -> pl.DataFrame:
        """Return the quantization errors recorded so far, with the columns of tables.ERRORS."""
        self.flush()
        return ERRORS.frame(self._errors)

    def flush(self) -> None:
        """Bring what was recorded to the host, and free its memory on the device.

        Raises RuntimeError where no step was ever marked, so that nothing can have been recorded.
        """
        if self.steps == self.start:
            raise RuntimeError("nothing is recorded: call step() after every optimizer step")
        pending, self._pending = self._pending, []
        extras = [extra.double().reshape(1) for r in pending for extra in r.extras.values()]
        vectors = fetch([*(record.summary.vector for record in pending), *extras])
        values = (vector.item() for vector in vectors[len(pending) :])
        for record, vector in zip(pending, vectors, strict=False):
            summary = replace(record.summary, vector=vector)
            columns = site_columns(record.linear, record.operand) | {"step": record.step}
            extra = {name: next(values) for name in record.extras}
            self._rows.append(columns | summary.row() | extra)
            site = {"site": columns["site"], "step": record.step}
            self._errors.extend(site | error for error in summary.error_rows())

    def _begin(self, model: nn.Module, args: object) -> None:
        counts = model.training or self._evaluation
        self._active = counts and (self.steps + 1) % self.every == 0

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        self._active = False
        self._latest = None

    def _after_optimizer(self, optimizer: object, args: object, kwargs: object) -> None:
        self.step()

    def _see_input(
        self, linear: Linear, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._active:
            return
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        chunk = self._latest
        if chunk is None or not chunk.is_of(x):
            seen = TensorStats(
                linear.in_features, operand="input", formats=self.formats, device=x.device
            )
            seen.update(x)
            chunk = self._latest = _Chunk(x, seen)
        before = self._inputs.get(linear.module)
        self._inputs[linear.module] = chunk.after(before)

    @torch.no_grad()
    def _record_weight(self, item: LinearModule) -> _Record:
        weight = item.weight().detach()
        linear = item.linear
        seen = TensorStats(
            linear.in_features, operand="weight", formats=self.formats, device=weight.device
        )
        seen.update(weight)
        extras: dict[str, Tensor] = {}
        if (initial := self._initial.get(linear.module)) is not None:
            extras["drift"] = _drift(weight, initial)
        if (partner := self._partners.get(linear.module)) is not None:
            other = next(i.weight() for i in self._linears if i.linear.module == partner)
            extras |= gate_up_alignment(
                weight, None if partner == linear.module else other.detach()
            )
        return _Record(
            linear=linear,
            operand="weight",
            step=self.steps,
            summary=seen.summary(),
            extras=extras,
        )


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """Return the hook as one that torch.compile breaks its graph for and does not trace."""
    plain: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return plain


def _version(x: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where torch does not count."""
    return None if x.is_inference() else x._version


def _drift(weight: Tensor, initial: Tensor) -> Tensor:
    """Return |W - W0|^2 / |W0|^2."""
    start = initial.float()
    return (weight.float() - start).square().sum() / start.square().sum()
