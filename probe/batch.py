"""The statistics of a whole model reduced together, on the device, in a few launches.

`TensorStats.summary` takes about a hundred small operations for one tensor; `stack` puts the states
of many side by side and `Batch.vectors` does these operations once for all. Between the two the
states of several ranks can be joined (ranks.py).

Sites are in the order of `site_order`: inputs before weights, each by width, so that tensors of one
width are neighbors and only the inputs carry tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from bitplan.formats import Operand
from bitplan.probe.histogram import read_histogram
from bitplan.probe.moments import moments_of, pool, shape_of
from bitplan.probe.tensor_stats import (
    _ERRORS,
    _FIRST,
    _MEAN,
    _N,
    _SCALARS,
    _SEQUENCE,
    OUTLIER_SIGMAS,
    QUANTILES,
    TOP,
    TOP_SHARE,
    TOP_TOKENS,
    Summary,
    TensorStats,
    settle,
)

EXTRAS = ("drift", "gate_up_correlation")
MAXIMA = ("gate_up_correlation_max",)


@dataclass
class Batch:
    """The states of several TensorStats on one device, stacked; float64 unless said.

    pooled: [sites, 2, 5]. top: [inputs, tokens, ...], rows of zeros behind those that are kept.
    histogram: [sites, bins], int32. absmax (float32), squares, counts: those of all channels of
    all sites in a row. nonfinite: NaN, infinities, [sites, 2]. errors: squared errors of all tokens
    and of first ones, [sites, 2, formats]. extras: numerator and denominator of each of EXTRAS,
    [sites, extras, 2]. maxima: of MAXIMA, float32, below 0 where there are none, [sites, maxima].
    numbers: rows, sequences, and whether anything was seen, [sites, 3].
    """

    widths: list[int]
    pooled: Tensor
    top: Tensor
    histogram: Tensor
    absmax: Tensor
    squares: Tensor
    counts: Tensor
    nonfinite: Tensor
    errors: Tensor
    extras: Tensor
    maxima: Tensor
    numbers: Tensor

    def vectors(self) -> Tensor:
        """Return what `read` reads on the host, [sites, ...]; the host does not wait."""
        rows = self.numbers[:, 0]
        parts = self._parts(rows)
        std, skewness, kurtosis = shape_of(parts)
        count, mean = parts[:, 0, _N], parts[:, 0, _MEAN]
        widest, kurtosis_of_rms, squares, channels = self._channels()
        quantiles, outliers = read_histogram(
            self.histogram,
            tuple(QUANTILES.values()),
            total=count,
            mean=mean,
            distance=OUTLIER_SIGMAS * std[:, 0],
        )
        scalars = {
            "count": count,
            "mean": mean,
            "std": std[:, 0],
            "skewness": skewness[:, 0],
            "kurtosis": kurtosis[:, 0],
            "absmax": widest,
            "rms": (std[:, 0] ** 2 + mean**2).sqrt(),
            **dict(zip(QUANTILES, quantiles.minimum(widest[:, None]).unbind(-1), strict=True)),
            "outlier_share": outliers,
            "channel_rms_kurtosis": kurtosis_of_rms,
            "kurtosis_without_first_token": kurtosis[:, 1],
            "kurtosis_without_top_tokens": kurtosis[:, 2],
            "nan_count": self.nonfinite[:, 0],
            "inf_count": self.nonfinite[:, 1],
        }
        tokens = self.top[:, :TOP, _SEQUENCE:_ERRORS].flatten(1)
        errors, first_errors = self.errors.unbind(1)
        return torch.cat(
            [
                self.numbers,
                self.extras[..., 0] / self.extras[..., 1],
                self.maxima.double().where(self.maxima >= 0, torch.nan),
                channels,
                _more_rows(tokens, len(rows)),
                torch.stack([scalars[name] for name in _SCALARS], dim=1),
                errors / squares[:, None],
                self._top_errors(rows) / errors,
                first_errors / errors,
            ],
            dim=1,
        )

    def _parts(self, rows: Tensor) -> Tensor:
        """Return the moments of everything, without first tokens, and without the top tokens."""
        kept = self.top[..., :5]
        others = kept * (1 - self.top[..., _FIRST, None])
        lower = others * ~self._excluded(rows)
        tokens = _more_rows(pool(torch.stack([kept, others, lower], dim=1)), len(rows))
        first = self.pooled[:, 1]
        first = torch.stack([first, torch.zeros_like(first), torch.zeros_like(first)], dim=1)
        rest = self.pooled[:, :1].expand_as(first)
        return pool(torch.stack([rest, first, tokens], dim=2))

    def _top_errors(self, rows: Tensor) -> Tensor:
        """Return the squared errors of the top 1 % of the tokens, [sites, formats]."""
        found = (self.top[..., _ERRORS:] * self._excluded(rows)).sum(1)
        found = F.pad(found, (0, self.errors.shape[-1] - found.shape[-1]))
        return _more_rows(found, len(rows))

    def _excluded(self, rows: Tensor) -> Tensor:
        """Return which of the tokens kept are the top 1 %, [inputs, tokens, 1]."""
        count = (TOP_SHARE * rows[: len(self.top)]).ceil().clamp_max(TOP_TOKENS)
        index = torch.arange(self.top.shape[1], device=self.top.device)
        return (index < count[:, None])[..., None]

    def _channels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return absmax, kurtosis of the channel rms, summed squares, and the top channels."""
        found = []
        start = 0
        for width, group in groupby(self.widths):
            end = start + width * len(list(group))
            absmax, squares, counts = (
                values[start:end].view(-1, width)
                for values in (self.absmax, self.squares, self.counts)
            )
            start = end
            rms, channel = (squares / counts.clamp_min(1)).sqrt().sort(descending=True, stable=True)
            rms_top, channel_top = rms[:, :TOP], channel[:, :TOP]
            top = [channel_top.double(), absmax.gather(1, channel_top).double(), rms_top]
            missing = 3 * (TOP - rms_top.shape[1])
            found.append(
                (
                    absmax.amax(-1).double(),
                    shape_of(moments_of(rms))[2],
                    squares.sum(-1),
                    F.pad(torch.stack(top, dim=-1).flatten(1), (0, missing)),
                )
            )
        widest, kurtosis, squares, channels = (torch.cat(p) for p in zip(*found, strict=True))
        return widest, kurtosis, squares, channels


def site_order(stats: TensorStats) -> tuple[str, int]:
    """Return what the sites of a batch are sorted by."""
    return stats.operand, stats.in_features


def stack(
    stats: Sequence[TensorStats],
    seen: Sequence[bool],
    extras: Tensor,
    maxima: Tensor,
    tokens: int | None = None,
) -> Batch:
    """Stack states that are in the order of `site_order`; extras and maxima as in Batch.

    seen: which of them were given a tensor, if an empty one. tokens: how many an input keeps; by
    default as many as the most that one of them has.
    """
    settle(stats)
    inputs = [s for s in stats if s.operand == "input"]
    kept = tokens or max([TOP, *(len(s._top) for s in inputs)])
    tops = [_more_rows(s._top, kept) for s in inputs]
    formats = max(len(s.formats) for s in stats)
    errors = [
        part if part.numel() == formats else F.pad(part, (0, formats - part.numel()))
        for s in stats
        for part in (s._errors, s._first_errors)
    ]
    numbers = [[s.rows, s.sequences, flag] for s, flag in zip(stats, seen, strict=True)]
    return Batch(
        widths=[s.in_features for s in stats],
        pooled=torch.stack([s._pooled for s in stats]),
        top=torch.stack(tops) if tops else stats[0]._top.new_zeros(0, kept, _ERRORS),
        histogram=torch.stack([s._totals.histogram for s in stats]),
        absmax=torch.cat([s._totals.absmax for s in stats]),
        squares=torch.cat([s._totals.squares for s in stats]),
        counts=torch.cat([s._totals.counts for s in stats]),
        nonfinite=torch.stack([s._totals.nonfinite for s in stats]),
        errors=torch.stack(errors).view(len(stats), 2, formats),
        extras=extras,
        maxima=maxima,
        numbers=torch.tensor(numbers, dtype=torch.float64).to(stats[0].device, non_blocking=True),
    )


def reset(stats: Sequence[TensorStats]) -> None:
    """Make statistics on one device those of nothing; totals stay in the memory that they have."""
    zeroed: dict[torch.dtype, list[Tensor]] = {}
    formats = max(len(s.formats) for s in stats)
    pooled = stats[0]._pooled.new_zeros(len(stats), 2, 5).unbind()
    errors = stats[0]._pooled.new_zeros(2, len(stats), formats)
    for s, s._pooled, e, first in zip(
        stats, pooled, *(part.unbind() for part in errors), strict=True
    ):
        s._errors, s._first_errors = e[: len(s.formats)], first[: len(s.formats)]
        s._top = s._top[:0]
        s.rows = s.sequences = 0
        s._pending, s._settled = [], False
        for state in s._totals:
            zeroed.setdefault(state.dtype, []).append(state)
    for states in zeroed.values():
        torch._foreach_zero_(states)


def read(
    vector: Tensor, operand: Operand, in_features: int, formats: Sequence[str]
) -> tuple[Summary, dict[str, float]] | None:
    """Return what a row of `Batch.vectors` says, brought to the host; None if nothing was seen.

    formats: names of those that apply to the operand. Extras that were not computed are NaN.
    """
    sizes = [3, len(EXTRAS + MAXIMA), 3 * TOP, 3 * TOP]
    numbers, extras, channels, tokens, rest = torch.split(
        vector, [*sizes, len(vector) - sum(sizes)]
    )
    if not numbers[2]:
        return None
    rows = int(numbers[0]) if operand == "input" else None
    top_channels, top_tokens = min(TOP, in_features), min(TOP, rows or 0)
    scalars, errors = rest[: len(_SCALARS)], rest[len(_SCALARS) :].view(3, -1)
    summary = Summary(
        vector=torch.cat(
            [
                scalars,
                errors[:, : len(formats)].flatten(),
                channels[: 3 * top_channels],
                tokens[: 3 * top_tokens],
            ]
        ),
        formats=tuple(formats),
        channels=top_channels,
        tokens=rows,
    )
    return summary, dict(zip(EXTRAS + MAXIMA, extras.tolist(), strict=True))


def _more_rows(x: Tensor, rows: int) -> Tensor:
    """Return a tensor with rows of zeros after its own, up to `rows`."""
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
