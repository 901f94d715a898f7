"""Sensitivity: what quantizing one site does to the loss, from backward passes alone.

Let L be the summed next-token cross-entropy, g_t = dL/dx_t the gradient at a tensor's row t, h_t
the same for labels drawn from the model's own predictions, and e_t = Q(x_t) - x_t the quantization
error under a format. The estimate, in nats per predicted token,

    delta_loss = sum_t [ g_t.e_t + (h_t.e_t)^2 / 2 ] / tokens
    kl         = sum_t [ (h_t.e_t)^2 / 2 ] / tokens

is a Taylor step whose second-order term stands on the Fisher information: with drawn labels, the
squared directional derivatives of the loss have the curvature of the KL divergence as their mean.
(True labels make them about 1.4 times too large: benchmarks/LOG.md.) Of few sequences labels are
drawn several times over, since a draw says little of the few rows that all others attend to. Errors
of different rows are taken as independent, so their cross terms are left out. The passes serve
every site and format.

An input is what a group of linears is handed (q/k/v; gate and up): g is the gradient through these
linears alone, not through a residual that reads the same tensor, and each gets an equal share. For
a weight W with error E, a row moves the loss by d_t.(E x_t), d_t the gradient of the linear's
output and x_t its input; the sum over rows of d_t.(E x_t) is the exact first-order term.

The standard error is that of the mean over sequences.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitplan.formats import Format, Operand
from bitplan.probe.modules import LinearModule
from bitplan.quantize import quantize_dequantize
from bitplan.sites import PLANNED_ROLES, Site

ROLES = (*PLANNED_ROLES, "lm_head")
_DRAWS = 16  # labels are drawn for at least this many sequences, so often over
_BLOCK = {"cpu": 1 << 18}  # elements quantized at a time; the temporaries stay in a core's cache
_GPU_BLOCK = 1 << 26


def summed_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the next-token cross-entropy in nats, summed over sequences and positions.

    logits: [sequences, tokens, vocabulary]; ids: [sequences, tokens].
    """
    predicted = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="sum")


def drawn_labels(logits: Tensor, first: int, draw: int) -> Tensor:
    """Return labels [sequences, tokens] drawn from a model's predictions, in the place of its ids.

    logits: [sequences, tokens, vocabulary]. The number of a sequence, from `first` on, and that of
    the draw are the seed, so that how sequences are batched changes nothing.
    """
    labels = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    generator = torch.Generator(logits.device)
    for index, sequence in enumerate(logits.detach()):
        generator.manual_seed(_DRAWS * (first + index) + draw)  # the CPU takes 32 bits of it
        shares = sequence[:-1].softmax(-1)
        labels[index, 1:] = torch.multinomial(shares, 1, generator=generator)[:, 0]
    return labels


def mean_and_stderr(by_sequence: Tensor) -> tuple[float, float | None]:
    """Return the mean over sequences [sequences] and its standard error, None of a single one."""
    count = len(by_sequence)
    stderr = by_sequence.std().item() / math.sqrt(count) if count > 1 else None
    return by_sequence.mean().item(), stderr


def input_terms(x: Tensor, gradient: Tensor, fmt: Format) -> Tensor:
    """Return each row's g.e for an input [rows, in_features] quantized to a format, [rows]."""
    if fmt.granularity == "tensor" or fmt.kind == "nvfp4":  # one scale over all rows
        return _dot(gradient, quantize_dequantize(x, fmt).sub_(x))
    size = max(1, _BLOCK.get(x.device.type, _GPU_BLOCK) // x.shape[-1])
    blocks = (slice(first, first + size) for first in range(0, len(x), size))
    return torch.cat([_dot(gradient[b], quantize_dequantize(x[b], fmt).sub_(x[b])) for b in blocks])


def weight_terms(x: Tensor, gradient: Tensor, error: Tensor) -> Tensor:
    """Return each row's d.(E x), [rows].

    x: inputs [rows, in_features]; gradient: of the outputs [rows, out_features]; error: Q(W) - W,
    [out_features, in_features].
    """
    rows, columns = error.shape
    return _dot(gradient, x @ error.T) if rows < columns else _dot(gradient @ error, x)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _on_gradient(x: Tensor, hook: Callable[[Tensor], None]) -> None:
    x.register_hook(hook)  # type: ignore[no-untyped-call]


class _Terms:
    """A tensor's g.e and the square of its h.e for each format, summed by sequence."""

    def __init__(self, formats: Sequence[Format], sequences: int, device: torch.device) -> None:
        self.formats = tuple(formats)
        shape = (2, len(self.formats), sequences)
        self.first, self.square = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, index: int, terms: Tensor, sequences: Tensor, *, squared: bool) -> None:
        """Add the terms of rows [rows], which belong to these sequences [rows]."""
        exact = terms.double()
        if squared:
            self.square[index].index_add_(0, sequences, exact.square())
        else:
            self.first[index].index_add_(0, sequences, exact)


class GradientSensitivity:
    """Gathers the estimate while batches run forward and backward.

    Call `input` and `output` on each linear as it runs, then `backward`: hooks on the tensors do
    the rest. What no token reached has no rows.
    """

    def __init__(
        self, formats: Sequence[Format], *, sequences: int, seq_len: int, device: torch.device
    ) -> None:
        self._formats = tuple(formats)
        self._sequences = sequences
        self._predicted = seq_len - 1
        self._device = device
        self._terms: dict[tuple[str, Operand], _Terms] = {}
        self._leaders: dict[str, str] = {}
        self._squared = False
        self.draws = max(1, -(-_DRAWS // sequences))

    @property
    def passes(self) -> int:
        """Backward passes of a batch: from its true labels, then from drawn ones."""
        return 1 + self.draws

    def start(self, number: int) -> None:
        """Say which pass comes next: 0 from the true labels, the others from drawn ones."""
        self._squared = number > 0

    def losses(self, logits: Tensor, ids: Tensor, first: int) -> Iterator[Tensor]:
        """Yield the summed loss that each pass goes backward from, after `start`.

        logits: [sequences, tokens, vocabulary]; ids: [sequences, tokens], the first number `first`.
        """
        for number in range(self.passes):
            self.start(number)
            labels = drawn_labels(logits, first, number - 1) if number else ids
            yield summed_loss(logits, labels)

    def backward(self, logits: Tensor, ids: Tensor, first: int) -> Tensor:
        """Run all passes of a batch; return its summed loss. Arguments as those of `losses`."""
        losses = []
        for loss in self.losses(logits, ids, first):
            losses.append(loss.detach())
            # Not Tensor.backward, which nnsight replaces.
            torch.autograd.backward(loss, retain_graph=len(losses) < self.passes)
        return losses[0]

    def input(self, name: str, x: Tensor, sequences: Tensor) -> Tensor:
        """Watch the tensor [..., in_features] that a linear is handed; return what it must read.

        sequences: the sequence of each row, [rows]. What comes back is a view, whose gradient is
        that through its readers alone; hand it to those that share it, and `share` them.
        """
        if x.numel() == 0:
            return x
        view = x.view_as(x)
        _on_gradient(view, partial(self._on_input, self._of(name, "input"), x.detach(), sequences))
        self._leaders[name] = name
        return view

    def share(self, name: str, leader: str) -> None:
        """Note that the linear `name` reads the tensor watched as that of `leader`."""
        if leader in self._leaders:
            self._leaders[name] = leader

    def output(self, item: LinearModule, x: Tensor, y: Tensor, sequences: Tensor) -> None:
        """Watch a linear's output [..., out_features], computed from x [..., in_features]."""
        if x.numel():
            terms = self._of(item.linear.module, "weight")
            _on_gradient(y, partial(self._on_output, terms, item, x.detach(), sequences))

    def rows(self, items: Sequence[LinearModule]) -> Iterator[dict[str, Any]]:
        """Yield the rows of tables.SENSITIVITY, method `gradient`."""
        readers = Counter(self._leaders.values())
        for item in items:
            name = item.linear.module
            leader = self._leaders.get(name, name)
            yield from self._site_rows(item.linear.site("weight"), name, 1)
            yield from self._site_rows(item.linear.site("input"), leader, readers[leader])

    def _site_rows(self, site: Site, measured_at: str, share: int) -> Iterator[dict[str, Any]]:
        if (terms := self._terms.get((measured_at, site.operand))) is None:
            return
        for index, fmt in enumerate(terms.formats):
            yield {
                "site": str(site),
                "format": fmt.name,
                "method": "gradient",
                **self._estimate(terms.first[index], terms.square[index], share),
            }

    def _estimate(self, first: Tensor, square: Tensor, share: int) -> dict[str, float | None]:
        """Return one reader's share of a tensor's estimate, in nats per predicted token."""
        kl = square / 2 / (self.draws * self._predicted * share)
        change = first / (self._predicted * share) + kl
        names = ("delta_loss", "stderr", "kl", "kl_stderr")
        return dict(zip(names, (*mean_and_stderr(change), *mean_and_stderr(kl)), strict=True))

    def _of(self, name: str, operand: Operand) -> _Terms:
        if (name, operand) not in self._terms:
            formats = [fmt for fmt in self._formats if fmt.applies_to(operand)]
            self._terms[name, operand] = _Terms(formats, self._sequences, self._device)
        return self._terms[name, operand]

    @torch.no_grad()
    def _on_input(self, terms: _Terms, x: Tensor, sequences: Tensor, gradient: Tensor) -> None:
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        for index, fmt in enumerate(terms.formats):
            if fmt.is_quantized:
                terms.add(index, input_terms(x, gradient, fmt), sequences, squared=self._squared)

    @torch.no_grad()
    def _on_output(
        self, terms: _Terms, item: LinearModule, x: Tensor, sequences: Tensor, gradient: Tensor
    ) -> None:
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        weight = item.weight()
        for index, fmt in enumerate(terms.formats):
            if fmt.is_quantized:
                error = quantize_dequantize(weight, fmt).sub_(weight)
                change = weight_terms(x, gradient, error)
                terms.add(index, change, sequences, squared=self._squared)
