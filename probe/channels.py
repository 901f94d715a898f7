"""Channels: do the largest ones stay the same, from sequence to sequence and from block to block?

Outliers that keep to their channels can be treated at rest (scaled into the weight, rotated away,
kept in more bits); outliers that move cannot. Two numbers say which it is:

    stability   share of the calibration sequences in which a channel is among the TOP by rms
    overlap     mean share of an input's top channels that another reader of the residual stream
                (qkv and fc1 of every block) has among its own

By chance both are TOP over the number of channels. The state is one count per channel.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitplan.probe.tensor_stats import TOP

RESIDUAL_ROLES = ("qkv", "fc1")


class ChannelStability:
    """Counts the sequences in which each channel of an input is among the TOP by rms."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._top = min(TOP, in_features)
        # The last entry counts the sequences themselves, so that one vector holds it all.
        self._counts = torch.zeros(in_features + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(
        self, x: Tensor, sequences: Tensor | None = None, *, num_sequences: int | None = None
    ) -> None:
        """Take in whole sequences: [sequences, tokens, in_features], or rows in any order.

        sequences: of each row of x [rows, in_features], below num_sequences; a sequence without a
        row does not count. Channels with NaN or infinite values are never among the top.
        """
        if x.numel() == 0:
            return
        squares = x.detach().float().square()
        if sequences is None:
            energy = squares.sum(1)
        else:
            assert num_sequences is not None
            energy = squares.new_zeros(num_sequences, x.shape[-1])
            energy.index_add_(0, sequences, squares.flatten(0, -2))
        energy.nan_to_num_(nan=0.0, posinf=0.0)
        seen = (energy > 0).any(1, keepdim=True).double()
        top = energy.topk(self._top, dim=1).indices
        self._counts.index_add_(0, top.flatten(), seen.expand(-1, self._top).flatten())
        self._counts[-1] += seen.sum()

    def counts(self) -> Tensor:
        """Return the sequences of each channel, then those seen: [in_features + 1], float64."""
        return self._counts


def with_stability(row: Mapping[str, Any], counts: Tensor) -> dict[str, Any]:
    """Return a row of tables.PROFILE whose top channels have their stability.

    counts: as `ChannelStability.counts` returns them, on the host.
    """
    sequences = float(counts[-1])
    if not sequences or not row["top_channels"]:
        return dict(row)
    channels = [
        channel | {"stability": float(counts[channel["channel"]]) / sequences}
        for channel in row["top_channels"]
    ]
    mean = sum(channel["stability"] for channel in channels) / len(channels)
    return dict(row) | {"top_channels": channels, "top_channel_stability": mean}


def channel_overlap(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return for each input of the residual stream, by site, its overlap with the others.

    rows: of tables.PROFILE; linears that share an input are one reader. Experts, which see a part
    of the tokens each, are left out.
    """
    readers: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        in_block = row["block"] is not None and row["expert"] is None
        if row["operand"] == "input" and row["role"] in RESIDUAL_ROLES and in_block:
            shared = row["fused"] or row["module"]
            readers.setdefault((row["in_features"], shared), []).append(row)
    tops = {
        key: {channel["channel"] for channel in group[0].get("top_channels") or ()}
        for key, group in readers.items()
    }
    holders = Counter((key[0], channel) for key, top in tops.items() for channel in top)
    widths = Counter(key[0] for key in tops)
    overlap: dict[str, float] = {}
    for key, group in readers.items():
        others = widths[key[0]] - 1
        if not others or not tops[key]:
            continue
        shares = sum(holders[key[0], channel] - 1 for channel in tops[key])
        overlap |= dict.fromkeys((row["site"] for row in group), shares / (len(tops[key]) * others))
    return overlap
