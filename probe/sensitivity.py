"""Sensitivity: what quantizing one site does to the loss, from backward passes alone.

Let L be the summed next-token cross-entropy, g_t = dL/dx_t the gradient at a tensor's row t, h_t
the same for labels drawn from the model's own predictions, and e_t = Q(x_t) - x_t the quantization
error under a format. The estimate, in nats per predicted token,

    delta_loss = sum_t g_t.e_t / tokens + kl
    kl         = sum_t (h_t.e_t)^2 / 2 / tokens

is a Taylor step whose second-order term stands on the Fisher information: with drawn labels, the
squared directional derivatives of the loss have the curvature of the KL divergence as their mean.
(True labels make them about 1.4 times too large.) Of few sequences labels are drawn several times
over, since a draw says little of the few rows that all others attend to. The passes serve every
site and format. Readings of all choices here are in benchmarks/LOG.md.

An input is what a group of linears is handed (q/k/v; gate and up): g is the gradient through these
linears alone, not through a residual that reads the same tensor, and each gets an equal share. Its
errors in different rows are taken as independent, so their cross terms are left out.

For a weight W with error E, a row moves the loss by d_t.(E x_t), d_t the gradient of the linear's
output and x_t its input. E is the same in all rows, so cross terms count: a shift that all keys
share cancels in the softmax, one that all values share does not average out. Rows are therefore
summed before they are squared, over windows of 32; what windows of 256 add, which is noisier, is
counted as far as it stands out of its standard error. Sums over whole sequences and windows are
products with d^T x, whatever the number of formats.

The standard error is that of the mean over sequences.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
_DRAWS = 32  # labels are drawn for at least this many sequences, so often over
_NEAR = 32  # rows of a window
_FAR = 8  # windows of a wide window
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
        below = sequence[:-1].softmax(-1).cumsum_(-1)  # torch.multinomial takes 12 times as long
        level = torch.rand(len(below), 1, generator=generator, device=logits.device)
        drawn = torch.searchsorted(below, level * below[:, -1:], right=True)
        labels[index, 1:] = drawn[:, 0].clamp_(max=logits.shape[-1] - 1)
    return labels


def mean_and_stderr(by_sequence: Tensor) -> tuple[float, float | None]:
    """Return the mean over sequences [sequences] and its standard error, None of a single one."""
    count = len(by_sequence)
    stderr = by_sequence.std().item() / math.sqrt(count) if count > 1 else None
    return by_sequence.mean().item(), stderr


def standing_out(by_sequence: Tensor) -> float:
    """Return the share of a mean over sequences that stands out of its noise: 1 - (stderr/mean)^2.

    0 where it does not, and where one sequence leaves the noise unknown.
    """
    mean, stderr = mean_and_stderr(by_sequence)
    return 0.0 if stderr is None or mean == 0 else max(0.0, 1 - (stderr / mean) ** 2)


def input_terms(x: Tensor, gradients: Sequence[Tensor], fmt: Format) -> Tensor:
    """Return each row's g.e for an input quantized to a format, [gradients, rows].

    x: [rows, in_features], as each of the gradients.
    """
    size = max(1, _BLOCK.get(x.device.type, _GPU_BLOCK) // x.shape[-1])
    if fmt.granularity == "tensor" or fmt.kind == "nvfp4":  # one scale over all rows
        size = len(x)
    found = []
    for first in range(0, len(x), size):
        block = slice(first, first + size)
        error = quantize_dequantize(x[block], fmt).sub_(x[block])
        found.append(torch.stack([_dot(gradient[block], error) for gradient in gradients]))
    return torch.cat(found, dim=1)


def weight_terms(x: Tensor, gradient: Tensor, errors: Tensor) -> Tensor:
    """Return each row's d.(E x), [formats, rows].

    x: inputs [rows, in_features]; gradient: of the outputs [rows, out_features]; errors: Q(W) - W,
    [formats, out_features, in_features].
    """
    return torch.stack([_dot(gradient, x @ error.T) for error in errors])


def window_terms(x: Tensor, gradient: Tensor, errors: Tensor, width: int) -> Tensor:
    """Return each window's sum of d.(E x), [formats, sequences * windows]; the last may be short.

    x: inputs [sequences, tokens, in_features]; gradient: [sequences, tokens, out_features].
    """
    padding = (0, 0, 0, -x.shape[1] % width)
    x, gradient = (F.pad(t, padding).reshape(-1, width, t.shape[-1]) for t in (x, gradient))
    size = max(1, _BLOCK.get(x.device.type, _GPU_BLOCK) // errors[0].numel())
    flat = errors.flatten(1)
    products = zip(torch.split(gradient.mT, size), torch.split(x, size), strict=True)
    return torch.cat([flat @ torch.bmm(d, rows).flatten(1).T for d, rows in products], dim=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _on_gradient(x: Tensor, hook: Callable[[Tensor], None]) -> None:
    x.register_hook(hook)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Rows:
    """Where the rows of a tensor belong, [rows]: their sequence, and their position in it.

    `positions` is None where it cannot be told; `whole`: they are all rows of their sequences.
    """

    sequences: Tensor
    positions: Tensor | None
    whole: bool


class _Terms:
    """A tensor's first-order and second-order sums by format and sequence, [formats, sequences].

    `second` has the squares of near sums (rows of an input, windows of a weight) and of wide ones.
    """

    def __init__(
        self, formats: Sequence[Format], sequences: int, seq_len: int, device: torch.device
    ) -> None:
        self.formats = tuple(fmt for fmt in formats if fmt.is_quantized)
        self._windows = -(-seq_len // _NEAR)
        self.first, self.near, self.wide = torch.zeros(
            (3, len(self.formats), sequences), dtype=torch.float64, device=device
        )

    def add_first(self, terms: Tensor, sequences: Tensor) -> None:
        """Add sums [formats, n] of rows of these sequences [n]."""
        self.first.index_add_(1, sequences, terms.double())

    def add_squares(self, terms: Tensor, sequences: Tensor) -> None:
        """Add the squares of sums [formats, n] that have no cross terms with any other."""
        for squares in (self.near, self.wide):
            squares.index_add_(1, sequences, terms.double().square())

    def add_windows(self, terms: Tensor, windows: Tensor) -> None:
        """Add the squares of the sums by window of terms [formats, n]; windows [n]: _window_of."""
        formats, sequences = self.near.shape
        sums = torch.zeros(
            (formats, sequences * self._windows), dtype=torch.float64, device=terms.device
        ).index_add_(1, windows, terms.double())
        near = sums.view(formats, sequences, -1)
        wide = F.pad(near, (0, -self._windows % _FAR)).view(formats, sequences, -1, _FAR).sum(-1)
        self.near += near.square().sum(-1)
        self.wide += wide.square().sum(-1)


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
        self._seq_len = seq_len
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

    def input(self, name: str, x: Tensor, rows: Rows) -> Tensor:
        """Watch the tensor [..., in_features] that a linear is handed; return what it must read.

        What comes back is a view, whose gradient is that through its readers alone; hand it to
        those that share it, and `share` them.
        """
        if x.numel() == 0:
            return x
        view = x.view_as(x)
        _on_gradient(view, partial(self._on_input, self._of(name, "input"), x.detach(), rows, []))
        self._leaders[name] = name
        return view

    def share(self, name: str, leader: str) -> None:
        """Note that the linear `name` reads the tensor watched as that of `leader`."""
        if leader in self._leaders:
            self._leaders[name] = leader

    def output(self, item: LinearModule, x: Tensor, y: Tensor, rows: Rows) -> None:
        """Watch a linear's output [..., out_features], computed from x [..., in_features]."""
        if x.numel():
            terms = self._of(item.linear.module, "weight")
            _on_gradient(y, partial(self._on_output, terms, item, x.detach(), rows, []))

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
        for fmt in self._formats:
            if fmt.applies_to(site.operand):
                yield {
                    "site": str(site),
                    "format": fmt.name,
                    "method": "gradient",
                    **self._estimate(terms, fmt, share),
                }

    def _estimate(self, terms: _Terms, fmt: Format, share: int) -> dict[str, float | None]:
        """Return one reader's share of a tensor's estimate, in nats per predicted token."""
        predicted = (self._seq_len - 1) * share
        change = kl = torch.zeros(self._sequences, dtype=torch.float64)
        if fmt.is_quantized:
            index = terms.formats.index(fmt)
            near, wide = (s[index].cpu() / 2 / self.draws for s in (terms.near, terms.wide))
            kl = (near + standing_out(wide - near) * (wide - near)) / predicted
            change = terms.first[index].cpu() / predicted + kl
        names = ("delta_loss", "stderr", "kl", "kl_stderr")
        return dict(zip(names, (*mean_and_stderr(change), *mean_and_stderr(kl)), strict=True))

    def _of(self, name: str, operand: Operand) -> _Terms:
        if (name, operand) not in self._terms:
            formats = [fmt for fmt in self._formats if fmt.applies_to(operand)]
            self._terms[name, operand] = _Terms(
                formats, self._sequences, self._seq_len, self._device
            )
        return self._terms[name, operand]

    @torch.no_grad()
    def _on_input(
        self, terms: _Terms, x: Tensor, rows: Rows, waiting: list[Tensor], gradient: Tensor
    ) -> None:
        # The gradient of the true labels waits for a drawn one, so that errors are made once.
        waiting.append(gradient.flatten(0, -2))
        if not self._squared or not terms.formats:
            return
        x = x.flatten(0, -2)
        *first, drawn = torch.stack([input_terms(x, waiting, fmt) for fmt in terms.formats], 1)
        waiting.clear()
        for change in first:
            terms.add_first(change, rows.sequences)
        terms.add_squares(drawn, rows.sequences)

    @torch.no_grad()
    def _on_output(
        self,
        terms: _Terms,
        item: LinearModule,
        x: Tensor,
        rows: Rows,
        waiting: list[Tensor],
        gradient: Tensor,
    ) -> None:
        waiting.append(gradient)
        if not self._squared or not terms.formats:
            return
        *first, drawn = waiting
        waiting.clear()
        weight = item.weight()
        errors = torch.stack([quantize_dequantize(weight, f).sub_(weight) for f in terms.formats])
        if rows.whole and rows.positions is not None:
            shape = (-1, self._seq_len)
            x, drawn, *first = (t.reshape(*shape, t.shape[-1]) for t in (x, drawn, *first))
            starts = rows.sequences.view(shape)[:, ::_NEAR], rows.positions.view(shape)[:, ::_NEAR]
            for change in first:
                changes = window_terms(x, change, errors, self._seq_len)
                terms.add_first(changes, rows.sequences[:: self._seq_len])
            windows = window_terms(x, drawn, errors, _NEAR)
            terms.add_windows(windows, self._window_of(*map(torch.flatten, starts)))
            return
        x, drawn, *first = (t.flatten(0, -2) for t in (x, drawn, *first))
        for change in first:
            terms.add_first(weight_terms(x, change, errors), rows.sequences)
        changes = weight_terms(x, drawn, errors)
        if rows.positions is None:
            terms.add_squares(changes, rows.sequences)
        else:
            terms.add_windows(changes, self._window_of(rows.sequences, rows.positions))

    def _window_of(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """Return the number of each row's window among those of all sequences, [rows]."""
        return sequences * -(-self._seq_len // _NEAR) + positions // _NEAR
