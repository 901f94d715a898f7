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

Inputs count while `model` is in training mode and no backward pass runs: evaluation is not
recorded, and a layer that gradient checkpointing runs again is not counted twice. Linears that
share their input (q/k/v; gate/up) share one computation (streams.py). Under autocast an input is
what is multiplied, after rounding. Hooks stay within the graph
of torch.compile (observe.py); entering makes compiled code start over, so enter before training.

Nothing waits for the device until `frame`, `errors_frame` or `flush` brings all that was recorded
to the host in one transfer per device; a recorded step is reduced on the device for all sites at
once (batch.py), and what it needs is allocated once: 0.8 MB and the channels of every tensor.

Where torch.distributed runs, the statistics of all ranks are joined in `step` (ranks.py), and
every rank holds the same tables: enter the recorder and mark the steps on every rank.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import polars as pl
import torch
from torch import Tensor, nn

from bitplan.errors import CheckpointError
from bitplan.formats import Format, Operand, parse_format
from bitplan.probe.batch import EXTRAS, MAXIMA, read, reset, site_order, stack
from bitplan.probe.modules import LinearModule, find_linears
from bitplan.probe.observe import Observation, observe
from bitplan.probe.ranks import Ranks, whole_tensor
from bitplan.probe.streams import Streams
from bitplan.probe.tensor_stats import TOP_TOKENS, TensorStats, fetch, update_all
from bitplan.probe.weights import gate_up_partners, row_cosines
from bitplan.sites import OPERANDS, Linear, site_columns
from bitplan.tables import ERRORS, PROFILE

_WRAPPED = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
_TOGETHER_ELEMENTS = 1 << 26  # of weights that are read, or gates compared with ups, at once
_PENDING_ROWS = 1 << 17  # tokens of a step that are settled for all sites at once
_NO_BACKWARD = -1  # torch's id of the backward pass that runs, if none does


@dataclass(eq=False)
class _Weight:
    """A parameter to record, of one linear or of several that are tied."""

    module: LinearModule
    turn: int
    whole: bool
    partner: "_Weight | None" = None
    stats: TensorStats | None = None
    initial: Tensor | None = None
    initial_square: Tensor | None = None


@dataclass(frozen=True)
class _Found:
    """The statistics of a site since the step before, what EXTRAS are the quotients of, MAXIMA."""

    site: int
    stats: TensorStats
    is_seen: bool = True
    extras: Sequence["_Quotient"] = ()
    maxima: Sequence[Tensor | None] = ()


@dataclass(frozen=True)
class _Quotient:
    """A numerator and a denominator, float32 on the device; None for nothing."""

    numerator: Tensor | None = None
    denominator: Tensor | None = None


@dataclass(frozen=True)
class _Cosines:
    """The |cosines| of matching rows of a gate and an up: their mean, and the largest."""

    mean: _Quotient = field(default_factory=_Quotient)
    largest: Tensor | None = None


@dataclass(frozen=True)
class _Record:
    """What was recorded of some sites at one step, still on the device."""

    step: int
    sites: list[int]
    vectors: Tensor


class Recorder:
    """Records statistics of weights and inputs at every `every`-th optimizer step.

    formats: formats, or their names, whose quantization error is recorded as well. sites: operands.
    evaluation: count forward passes in evaluation mode too; `step` still says when to record.
    optimizer: calls `step` by itself. drift: keep a copy of the weights, made on entry, and record
    how far they moved. start: optimizer steps already taken, for a training that resumes.
    merge_ranks: join the statistics of all ranks where torch.distributed runs. restart: let
    compiled code start over on entry; not where it only ever runs while the recorder is `hidden`.
    Raises CheckpointError on entry where the model has no linear, or ranks hold different ones.
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
        merge_ranks: bool = True,
        restart: bool = True,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: record every 1st step or fewer")
        self.model = model
        self.every = every
        self.formats = tuple(parse_format(f) if isinstance(f, str) else f for f in formats)
        self.sites = tuple(sites)
        self.optimizer = optimizer
        self.steps = start
        self.start = start
        self._evaluation = evaluation
        self._drift = drift
        self._merge_ranks = merge_ranks
        self._restart = restart
        self._handle: Any = None
        self._clear()
        self._sites: list[tuple[Linear, Operand]] = []
        self._pending: list[_Record] = []
        self._rows: list[dict[str, Any]] = []
        self._errors: list[dict[str, Any]] = []

    def _clear(self) -> None:
        """Let go of everything but what was recorded."""
        self._plain: nn.Module | None = None
        self._ranks: Ranks | None = None
        self._observation: Observation | None = None
        self._inputs: list[LinearModule] = []
        self._streams: Streams | None = None
        self._weights: list[_Weight] = []
        self._devices: dict[str, torch.device] = {}
        self._nothing: dict[tuple[Any, ...], TensorStats] = {}

    def __enter__(self) -> Self:
        plain = _unwrapped(self.model)
        linears = find_linears(plain)
        if not linears:
            raise CheckpointError("nothing to record: the model has no linear")
        ranks = Ranks.of_this_process() if self._merge_ranks else None
        inputs = [item for item in linears if item.has_input and "input" in self.sites]
        weights = linears if "weight" in self.sites else []
        self._sites = [(item.linear, "weight") for item in weights]
        self._sites += [(item.linear, "input") for item in inputs]
        if ranks is not None:
            ranks.agree_on([str(linear.site(operand)) for linear, operand in self._sites])
        self._plain, self._ranks, self._inputs = plain, ranks, inputs
        self._weights = self._find_weights(weights)
        self._devices = {item.linear.module: item.weight().device for item in linears}
        if inputs:
            self._streams = Streams([item.linear for item in inputs], self._new_input)
            modules = [item.module for item in inputs]
            self._observation = observe(modules, self, restart=self._restart)
        if self.optimizer is not None:
            self._handle = self.optimizer.register_step_post_hook(self._after_optimizer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._observation is not None:
            self._observation.stop()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._clear()

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the hooks off the model for as long as the block runs: its inputs do not count."""
        if self._observation is None:
            yield
        else:
            with self._observation.hidden():
                yield

    def step(self) -> None:
        """Mark the end of an optimizer step; record it if it is one of every `every`."""
        self.steps += 1
        if self.steps % self.every == 0:
            self._record()

    def see(self, index: int, x: Tensor, traced: bool) -> None:
        """Take note of a linear's input: what the hooks call (observe.Observer)."""
        if (self.steps + 1) % self.every or torch._C._current_graph_task_id() != _NO_BACKWARD:
            return
        assert self._plain is not None
        assert self._streams is not None
        if not (self._plain.training or self._evaluation):
            return
        _check_input(x, self._inputs[index].linear)
        with torch.inference_mode(False):  # statistics outlive a forward pass in inference mode
            self._streams.see(index, x, traced)

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
        vectors = fetch([record.vectors.flatten() for record in pending])
        rows: list[tuple[int, int, Tensor]] = []
        for record, values in zip(pending, vectors, strict=True):
            found = values.view(len(record.sites), -1)
            rows += zip([record.step] * len(found), record.sites, found, strict=True)
        for step, site, vector in sorted(rows, key=lambda row: row[:2]):
            self._add_rows(step, *self._sites[site], vector)

    def _add_rows(self, step: int, linear: Linear, operand: Operand, vector: Tensor) -> None:
        formats = [fmt.name for fmt in self.formats if fmt.applies_to(operand)]
        found = read(vector, operand, linear.in_features, formats)
        if found is None:
            return
        summary, extras = found
        columns = site_columns(linear, operand) | {"step": step}
        self._rows.append(columns | summary.row() | extras)
        site = {"site": columns["site"], "step": step}
        self._errors.extend(site | error for error in summary.error_rows())

    def _after_optimizer(self, optimizer: object, args: object, kwargs: object) -> None:
        self.step()

    @torch.no_grad()
    def _record(self) -> None:
        found = sorted(
            [*self._read_weights(), *self._read_inputs()],
            key=lambda item: (*site_order(item.stats), item.site),
        )
        for device in dict.fromkeys(item.stats.device for item in found):
            here = [item for item in found if item.stats.device == device]
            batch = stack(
                [item.stats for item in here],
                [item.is_seen for item in here],
                _stacked([item.extras for item in here], device),
                _largest([item.maxima for item in here], device),
                tokens=TOP_TOKENS if self._ranks is not None else None,
            )
            if self._ranks is not None:
                batch = self._ranks.join(batch)
            sites = [item.site for item in here]
            self._pending.append(_Record(self.steps, sites, batch.vectors()))
            reset(list({id(item.stats): item.stats for item in here}.values()))

    def _read_inputs(self) -> list[_Found]:
        """Return what the inputs were since the last step; across ranks, of uncalled ones too."""
        if self._streams is None:
            return []
        sites = range(len(self._sites) - len(self._inputs), len(self._sites))
        found = []
        for site, stats in zip(sites, self._streams.step(), strict=True):
            if stats is not None:
                found.append(_Found(site, stats))
            elif self._ranks is not None:
                found.append(_Found(site, self._empty(site), is_seen=False))
        return found

    def _read_weights(self) -> list[_Found]:
        """Return what the weights are; across ranks, this one's share of them."""
        found: dict[_Weight, TensorStats] = {}
        drifts: dict[_Weight, _Quotient] = {}
        pairs: dict[_Weight, tuple[Tensor, Tensor]] = {}
        cosines: dict[_Weight, _Cosines] = {}
        waiting: dict[_Weight, tuple[Tensor, bool]] = {}
        unread: list[tuple[TensorStats, Tensor]] = []
        if self._ranks is not None and self._plain is not None:
            self._ranks.shard(self._plain)
        for weight in dict.fromkeys(self._weights):
            rows, mine = self._share(weight)
            if mine:
                if weight.stats is None or weight.stats.device != rows.device:
                    weight.stats = self._new_stats(weight.module.linear, "weight", rows.device)
                unread.append((weight.stats, rows))
                found[weight] = weight.stats
                drifts[weight] = _drift(weight, rows)
            if weight.partner is weight and mine:
                gate, up = rows.chunk(2)
                pairs[weight] = gate, up
            elif weight.partner in waiting:
                other, other_mine = waiting.pop(weight.partner)
                if other_mine:
                    pairs[weight.partner] = other, rows
            elif weight.partner is not None:
                waiting[weight] = rows, mine
            # Gathered weights are not kept until all are.
            if sum(rows.numel() for _, rows in unread) >= _TOGETHER_ELEMENTS:
                _read(unread)
            if sum(gate.numel() for gate, _ in pairs.values()) >= _TOGETHER_ELEMENTS:
                cosines |= zip(pairs, _cosines(list(pairs.values())), strict=True)
                pairs.clear()
        _read(unread)
        cosines |= zip(pairs, _cosines(list(pairs.values())), strict=True)
        weights = []
        for site, weight in enumerate(self._weights):
            stats = found[weight] if weight in found else self._empty(site)
            aligned = cosines.get(weight) or cosines.get(weight.partner or weight, _Cosines())
            extras = drifts.get(weight, _Quotient()), aligned.mean
            weights.append(_Found(site, stats, extras=extras, maxima=(aligned.largest,)))
        return weights

    def _find_weights(self, linears: Sequence[LinearModule]) -> list[_Weight]:
        """Return the weight of each linear; those that are tied have the same."""
        partners = gate_up_partners(
            [item.linear for item in linears],
            getattr(getattr(self._plain, "config", None), "model_type", None),
        )
        whole = any(f.granularity == "tensor" or f.kind == "nvfp4" for f in self.formats)
        by_parameter: dict[int, _Weight] = {}
        weights: dict[str, _Weight] = {}
        for item in linears:
            name = item.linear.module
            parameter = item.module._parameters.get("weight")
            weights[name] = by_parameter.setdefault(
                id(item.module if parameter is None else parameter),
                _Weight(item, len(by_parameter), whole or partners.get(name) == name),
            )
        for name, weight in weights.items():
            weight.partner = weights.get(partners.get(name, ""))
        if self._drift:
            for weight in by_parameter.values():
                rows, mine = self._share(weight)
                if mine:
                    weight.initial = rows.detach().clone()
                    weight.initial_square = weight.initial.float().square().sum()
        return list(weights.values())

    @torch.no_grad()
    def _share(self, weight: _Weight) -> tuple[Tensor, bool]:
        """Return the rows of a weight that are here, and whether they are this rank's to read."""
        module = weight.module
        if self._ranks is None:
            return whole_tensor(module.weight()), True
        return self._ranks.share(module.weight(), weight.turn, weight.whole)

    def _new_input(self, linear: Linear, device: torch.device) -> TensorStats:
        return self._new_stats(linear, "input", device)

    def _new_stats(self, linear: Linear, operand: Operand, device: torch.device) -> TensorStats:
        return TensorStats(
            linear.in_features,
            operand=operand,
            formats=self.formats,
            device=device,
            pending_rows=_PENDING_ROWS,
        )

    def _empty(self, site: int) -> TensorStats:
        """Return statistics of nothing, where the other ranks have those of a site."""
        linear, operand = self._sites[site]
        device = self._devices[linear.module]
        key = operand, linear.in_features, device
        if key not in self._nothing:
            self._nothing[key] = self._new_stats(linear, operand, device)
        return self._nothing[key]


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within torch.compile's and DistributedDataParallel's wrappers."""
    while (attribute := _WRAPPED.get(type(model).__name__)) is not None:
        model = getattr(model, attribute)
    return model


def _check_input(x: object, linear: Linear) -> None:
    """Raise CheckpointError for an input that statistics do not read."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != linear.in_features:
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise CheckpointError(
            f"{linear.module} was called with {shape}, its matrix takes [..., "
            f"{linear.in_features}]: record sites=('weight',) of this model"
        )
    if hasattr(x, "device_mesh"):
        raise CheckpointError(
            f"the input of {linear.module} is a DTensor: inputs of tensor-parallel linears are not "
            "recorded, give sites=('weight',)"
        )


def _read(unread: list[tuple[TensorStats, Tensor]]) -> None:
    """Read tensors into their statistics, and forget them."""
    update_all([stats for stats, _ in unread], [rows for _, rows in unread])
    unread.clear()


def _drift(weight: _Weight, rows: Tensor) -> _Quotient:
    """Return |W - W0|^2 over |W0|^2."""
    if weight.initial is None:
        return _Quotient()
    moved = (rows.float() - weight.initial.float()).square().sum()
    return _Quotient(moved, weight.initial_square)


def _cosines(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_Cosines]:
    """Return what the |cosines| of matching rows of gates and ups come to, of each pair."""
    found: dict[int, _Cosines] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (gate, _) in enumerate(pairs):
        if len(gate):
            groups.setdefault((gate.shape, gate.dtype, gate.device), []).append(i)
    for group in groups.values():
        size = max(1, _TOGETHER_ELEMENTS // pairs[group[0]][0].numel())
        for start in range(0, len(group), size):
            some = group[start : start + size]
            gates, ups = (torch.stack([pairs[i][side] for i in some]) for side in (0, 1))
            cosines = row_cosines(gates, ups)
            sums, largest = cosines.sum(-1), cosines.amax(-1)
            rows = torch.full_like(sums, gates.shape[1])
            means = map(_Quotient, sums.unbind(), rows.unbind())
            found |= dict(zip(some, map(_Cosines, means, largest.unbind()), strict=True))
    return [found.get(i, _Cosines()) for i in range(len(pairs))]


def _stacked(extras: Sequence[Sequence[_Quotient]], device: torch.device) -> Tensor:
    """Return the extras of sites as batch.Batch has them, zeros where there are none."""
    zero = torch.zeros((), device=device)
    nothing = (_Quotient(),) * len(EXTRAS)
    parts = [
        zero if part is None else part
        for site in extras
        for quotient in site or nothing
        for part in (quotient.numerator, quotient.denominator)
    ]
    return torch.stack(parts).double().view(len(extras), len(EXTRAS), 2)


def _largest(maxima: Sequence[Sequence[Tensor | None]], device: torch.device) -> Tensor:
    """Return the maxima of sites as batch.Batch has them, -1 where there are none."""
    none = torch.full((), -1.0, device=device)
    nothing = (None,) * len(MAXIMA)
    parts = [none if part is None else part for site in maxima for part in site or nothing]
    return torch.stack(parts).view(len(maxima), len(MAXIMA))
