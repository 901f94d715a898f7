"""Interventions: what quantizing sites does to the predictions, measured in forward passes.

An intervention puts the quantized value in the place of an input (for one reader of a tensor, not
for the others) or of a weight (the linear's output is computed again from the quantized matrix).
Its effect is paired with the unquantized model on the same tokens: change of loss, KL divergence,
and the relative squared error of the last hidden states (arXiv 2509.23500).

A pass holds the same sequences several times over, in *slots*: slot 0 is left alone, each other
slot carries one intervention. So a pass is complete in itself, nothing of the base is kept between
passes, and memory does not grow with tokens. Slots are rows that we repeat and edit in one trace,
not nnsight's batched invokes: these tell rows apart by the first dimension and would mix the tokens
that a router sends to an expert (times of both: benchmarks/nnsight_overhead.py).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitplan.errors import CheckpointError, PlanError
from bitplan.formats import Format
from bitplan.probe.checkpoint import some
from bitplan.probe.experts import Expert
from bitplan.probe.modules import LinearModule
from bitplan.probe.sensitivity import mean_and_stderr
from bitplan.probe.trace import Tracer, traced
from bitplan.progress import track
from bitplan.quantize import quantize_dequantize
from bitplan.sites import Site

# More interventions in a pass share one unquantized slot, and more are lost by a kill.
MAX_INTERVENTIONS = 8
_PASS_BYTES = {"cpu": 1 << 30}
_GPU_PASS_BYTES = 1 << 34
_CHUNK_ELEMENTS = 1 << 22  # log-probabilities of a slot at a time


@dataclass(frozen=True)
class Intervention:
    """Sites that are quantized together, each to its format; a single site is the smallest case."""

    name: str
    formats: Mapping[Site, Format]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What an intervention did: nats per predicted token, standard errors over sequences.

    `last_layer_error` is the squared error of the last hidden states over their squared norm.
    """

    intervention: Intervention
    delta_loss: float
    stderr: float | None
    kl: float
    kl_stderr: float | None
    last_layer_error: float


def measure_interventions(
    model: Any, items: Sequence[LinearModule], ids: Tensor, interventions: Sequence[Intervention]
) -> Iterator[list[Effect]]:
    """Yield the effects on token ids [sequences, tokens], in order, as many as share a pass.

    Raises PlanError for a site that the model does not have or that no forward pass can quantize,
    CheckpointError for a linear that runs more than once in a pass, or never.
    """
    if not interventions:
        return
    by_name = {item.linear.module: item for item in items}
    for site in {site for each in interventions for site in each.formats}:
        _check(site, by_name.get(site.module), model)
    device = next(model.parameters()).device
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    slots, sequences = _shape_of_pass(items, head, len(interventions), ids.shape[1], device)
    waves = [interventions[i : i + slots - 1] for i in range(0, len(interventions), slots - 1)]
    batches = [ids[i : i + sequences] for i in range(0, len(ids), sequences)]
    names = sorted({head, *(site.module for each in interventions for site in each.formats)})
    with traced(model, names) as tracer:
        _check_order(tracer.order(ids[:1].to(device)), tracer.repeated, names, head)
        found: list[Tensor] = []
        steps = list(itertools.product(waves, batches))
        for wave, batch in track(steps, "measuring interventions"):
            found.append(_pass(tracer, batch.to(device), wave, head))
            if len(found) == len(batches):
                sums = torch.cat(found, dim=-1).cpu()
                found.clear()
                yield [_effect(*pair, ids.shape[1] - 1) for pair in zip(wave, sums, strict=True)]


def _check(site: Site, item: LinearModule | None, model: nn.Module) -> None:
    if item is None:
        raise PlanError(f"the model has no linear {site.module}: take a site of profile.parquet")
    if not (item.transposed or isinstance(item.module, nn.Linear)):
        raise PlanError(
            f"{site} cannot be quantized in a forward pass: {type(item.module).__name__} is no "
            "plain linear"
        )
    if item.linear.expert is not None and not isinstance(_parent(model, site.module), Expert):
        raise PlanError(
            f"{site} cannot be quantized in a forward pass: nothing tells which of its rows "
            "belong to which sequence"
        )


def _check_order(
    order: Sequence[str], repeated: Sequence[str], names: Sequence[str], head: str
) -> None:
    if repeated:
        raise CheckpointError(
            f"{some(repeated)} run more than once in a pass: an intervention would reach the first "
            "run alone"
        )
    if missing := sorted(set(names) - set(order)):
        raise CheckpointError(f"{some(missing)} did not run on text: nothing can be measured")
    if order[-1] != head:
        raise CheckpointError(f"{order[-1]} runs after {head}, which should make the predictions")


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _shape_of_pass(
    items: Sequence[LinearModule],
    head: str,
    interventions: int,
    seq_len: int,
    device: torch.device,
) -> tuple[int, int]:
    """Return a pass's slots, the base's among them, and the sequences in each."""
    linears = {item.linear.module: item.linear for item in items if item.has_input}
    logits = linears.pop(head).out_features
    # In front of the logits a block holds about six of its widest inputs and outputs at a time.
    widest = max((one.in_features + one.out_features for one in linears.values()), default=0)
    bound = _PASS_BYTES.get(device.type, _GPU_PASS_BYTES)
    rows = bound // (4 * seq_len * (logits + 6 * widest))
    slots = 1 + max(1, min(MAX_INTERVENTIONS, interventions, rows - 1))
    return slots, max(1, rows // slots)


# --- a pass ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edit:
    """What the slots of a pass put in place of a linear's input and of the product of its weight.

    `inputs` and `weights`: slot to format; `slot_rows`: tokens in a slot.
    """

    inputs: dict[int, Format]
    weights: dict[int, Format]
    slot_rows: int

    def on_input(self, parent: nn.Module, x: Tensor) -> Tensor:
        """Return the input with the rows of the slots in `inputs` quantized."""
        if not self.inputs:
            return x
        rows = x.flatten(0, -2).clone()
        for slot, fmt in self.inputs.items():
            mine = self._rows(slot, parent, len(rows))
            rows[mine] = quantize_dequantize(rows[mine], fmt)
        return rows.view(x.shape)

    def on_output(self, module: Any, parent: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the output with the rows of the slots in `weights` from the quantized weight."""
        if not self.weights:
            return y
        inputs, rows = x.flatten(0, -2), y.flatten(0, -2).clone()
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        for slot, fmt in self.weights.items():
            mine = self._rows(slot, parent, len(rows))
            rows[mine] = F.linear(inputs[mine], quantize_dequantize(weight, fmt), module.bias)
        return rows.view(y.shape)

    def _rows(self, slot: int, parent: nn.Module, count: int) -> Tensor | slice:
        """Return the places of a slot's tokens among the rows that a linear is handed."""
        if isinstance(parent, Expert) and parent.tokens is not None:
            return torch.where(parent.tokens // self.slot_rows == slot)[0]
        assert count % self.slot_rows == 0, (count, self.slot_rows)
        return slice(slot * self.slot_rows, (slot + 1) * self.slot_rows)


@torch.no_grad()
def _pass(tracer: Tracer, ids: Tensor, wave: Sequence[Intervention], head: str) -> Tensor:
    """Run ids [sequences, tokens] under each intervention: sums [intervention, 4, sequence]."""
    edits = {head: _Edit({}, {}, ids.numel())}
    for slot, intervention in enumerate(wave, start=1):
        for site, fmt in intervention.formats.items():
            edit = edits.setdefault(site.module, _Edit({}, {}, ids.numel()))
            (edit.inputs if site.operand == "input" else edit.weights)[slot] = fmt
    slots = len(wave) + 1
    return tracer.edit(ids.repeat(slots, 1), edits, partial(_sums, ids=ids, slots=slots))


def _sums(hidden: Tensor, logits: Tensor, *, ids: Tensor, slots: int) -> Tensor:
    """Return what each slot but the first changed, summed by sequence: [slot, 4, sequence].

    Of the predicted tokens the change of loss and the KL divergence; of all hidden states the
    squared error and the squared norm. hidden, logits: [slots * sequences, tokens, ...].
    """
    by_slot = hidden.view(slots, len(ids), -1)
    base = by_slot[0]
    error = (by_slot[1:] - base).square().sum(-1, dtype=torch.float64)
    norm = base.square().sum(-1, dtype=torch.float64).expand_as(error)
    change, kl = torch.zeros_like(error), torch.zeros_like(error)
    logits = logits.view(slots, len(ids), *logits.shape[1:])
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for sequence in range(len(ids)):
        for first in range(0, ids.shape[1] - 1, size):
            part = slice(first, min(first + size, ids.shape[1] - 1))
            labels = ids[sequence, part.start + 1 : part.stop + 1, None]
            expected = logits[0, sequence, part].log_softmax(-1)
            share = expected.exp()
            for slot in range(1, slots):
                found = logits[slot, sequence, part].log_softmax(-1)
                difference = expected - found
                change[slot - 1, sequence] += difference.gather(-1, labels).sum(dtype=torch.float64)
                kl[slot - 1, sequence] += torch.linalg.vecdot(share, difference).sum(
                    dtype=torch.float64
                )
    return torch.stack([change, kl, error, norm], dim=1)


def _effect(intervention: Intervention, sums: Tensor, predicted: int) -> Effect:
    """Return the effect from sums [4, sequence] over `predicted` tokens of each sequence."""
    change, kl, error, norm = sums
    delta_loss, stderr = mean_and_stderr(change / predicted)
    divergence, kl_stderr = mean_and_stderr(kl / predicted)
    return Effect(
        intervention=intervention,
        delta_loss=delta_loss,
        stderr=stderr,
        kl=divergence,
        kl_stderr=kl_stderr,
        last_layer_error=(error.sum() / norm.sum()).item(),
    )
