"""Massive activations, and the single weights that make them.

A value is massive where it is larger than ABOVE and than RATIO times the median magnitude of its
sequence (arXiv 2402.17762). `MassiveActivations` finds them in a hidden state: which channels, at
which token, on how many tokens.

A super weight (arXiv 2411.07191) is one scalar of a down projection that turns a spike of its input
into a massive output; without it the model fails. `OutputSpike` keeps the largest massive output
y[i] of a linear with the input row x that made it, so that the products W[i, j] x[j] say exactly
which weights did: a candidate makes at least SHARE of the output from an input that is a spike
itself, RATIO times its median. One forward pass is enough; whether the model fails without the
candidate is not measured.

Everything stays on the device until `vector` is fetched. NaN and infinite values are never massive.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ABOVE = 100.0
RATIO = 1000.0
SHARE = 0.2
TOP_CHANNELS = 8
TOP_WEIGHTS = 3

_FIELDS = 5  # magnitude, value, times the median, sequence, position


def massive(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return |x| of massive values, 0 for all others, and the median of each sequence.

    x: [sequences, tokens, channels]; medians: [sequences, 1, 1]. On a CPU, where looking costs no
    wait and medians cost more than all else, None says that nothing is massive.
    """
    magnitude = x.float().abs().nan_to_num_(nan=0.0, posinf=0.0)
    if x.device.type == "cpu" and not _may_be_massive(magnitude):
        return None
    median = magnitude.flatten(1).median(1).values[:, None, None]
    threshold = (RATIO * median).clamp_min(ABOVE)
    return magnitude.masked_fill_(magnitude <= threshold, 0.0), median


def _may_be_massive(magnitude: Tensor) -> bool:
    """Whether in any sequence half of the values are RATIO times smaller than the largest."""
    largest = magnitude.amax((1, 2), keepdim=True)
    if not bool((largest > ABOVE).any()):
        return False
    # The margin is for products and quotients that round differently.
    below = (magnitude < largest * (1.001 / RATIO)).sum((1, 2))
    half = (magnitude[0].numel() + 1) // 2
    return bool(((below >= half) & (largest.flatten() > ABOVE)).any())


class MassiveActivations:
    """The massive values of a hidden state [sequences, tokens, channels], seen in batches."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._largest = torch.zeros(_FIELDS, channels, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(2, channels, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, first_sequence: int) -> None:
        """Take in whole sequences, the first of them number `first_sequence`."""
        x = x.detach()
        if (found_here := massive(x)) is None:
            return
        magnitude, median = found_here
        self._tokens[0] += (magnitude > 0).sum((0, 1))
        self._tokens[1] += (magnitude[:, 0] > 0).sum(0)
        largest, row = magnitude.flatten(0, 1).max(0)
        sequence, position = row // x.shape[1], row % x.shape[1]
        found = torch.stack(
            [
                largest.double(),
                x.flatten(0, 1).gather(0, row[None])[0].double(),
                (largest / median.flatten()[sequence]).double(),
                (sequence + first_sequence).double(),
                position.double(),
            ]
        )
        self._largest = torch.where(found[0] > self._largest[0], found, self._largest)

    def vector(self) -> Tensor:
        """Return the TOP_CHANNELS largest channels and their tokens as one vector, float64."""
        top = self._largest[0].topk(min(TOP_CHANNELS, self._largest.shape[1])).indices
        return torch.cat(
            [top[None].double(), self._largest[:, top], self._tokens[:, top]]
        ).flatten()

    @staticmethod
    def findings(vector: Tensor) -> Iterator[dict[str, Any]]:
        """Yield the columns of tables.OUTLIERS for each massive channel, the largest first."""
        for column in vector.view(1 + _FIELDS + 2, -1).T.tolist():
            channel, magnitude, value, ratio, sequence, position, tokens, first_tokens = column
            if magnitude > 0:
                yield {
                    "channel": int(channel),
                    "value": value,
                    "value_over_median": ratio,
                    "sequence": int(sequence),
                    "position": int(position),
                    "tokens": int(tokens),
                    "first_tokens": int(first_tokens),
                }


class OutputSpike:
    """The largest massive output of a linear, and the input row that it comes from."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        # Magnitude, value, times the median, sequence, position; then the channel.
        self._spike = torch.zeros(_FIELDS + 1, dtype=torch.float64, device=device)
        self._input = torch.zeros(in_features, dtype=torch.float32, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, sequences: Tensor, positions: Tensor | None) -> None:
        """Take in an input [..., in_features] and output [sequences, tokens, out_features].

        sequences, positions: of each row, [rows]; without positions they are -1.
        """
        if y.numel() == 0:
            return
        x, y = x.detach(), y.detach()
        if (found_here := massive(y)) is None:
            return
        magnitude, median = found_here
        # Indices of one element, not scalars: a device's scalar as an index makes the host wait.
        largest, index = magnitude.flatten().max(0, keepdim=True)
        row, channel = index // y.shape[-1], index % y.shape[-1]
        position = -torch.ones_like(row) if positions is None else positions[row]
        found = torch.cat(
            [
                largest.double(),
                y.flatten()[index].double(),
                (largest / median.flatten()[row // y.shape[1]]).double(),
                sequences[row].double(),
                position.double(),
                channel.double(),
            ]
        )
        better = found[0] > self._spike[0]
        self._spike = torch.where(better, found, self._spike)
        self._input = torch.where(better, x.flatten(0, -2)[row][0].float(), self._input)

    @torch.no_grad()
    def vector(self, weight: Tensor) -> Tensor:
        """Return the spike and the TOP_WEIGHTS weights [out, in] that make most of it, float64."""
        row = weight.detach()[self._spike[5:].long()][0].double()
        products = row * self._input.double() / self._spike[1]
        top = products.nan_to_num(nan=0.0).topk(min(TOP_WEIGHTS, len(products))).indices
        made = torch.stack([top.double(), self._input[top].double(), row[top], products[top]])
        return torch.cat([self._spike, made.flatten()])

    @staticmethod
    def findings(vector: Tensor, input_median: float | None) -> Iterator[dict[str, Any]]:
        """Yield the columns of tables.OUTLIERS for each super-weight candidate.

        input_median: the median |x| of the linear's input.
        """
        magnitude, value, ratio, sequence, position, channel = vector[: _FIELDS + 1].tolist()
        if magnitude == 0 or not input_median:
            return
        for j, x, weight, share in vector[_FIELDS + 1 :].view(4, -1).T.tolist():
            if share >= SHARE and abs(x) > RATIO * input_median:
                yield {
                    "channel": int(channel),
                    "value": value,
                    "value_over_median": ratio,
                    "sequence": int(sequence),
                    "position": int(position),
                    "input_channel": int(j),
                    "input_value": x,
                    "input_over_median": abs(x) / input_median,
                    "weight": weight,
                    "share": share,
                }
