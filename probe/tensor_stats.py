"""Streaming statistics of one tensor that is seen in chunks, computed where the tensor lives.

`TensorStats.update` reads a chunk [..., in_features] once (onepass.py) and never makes the host
wait; what is found of its rows is pooled later, for many tensors together (`settle`). `merge` joins
two streams; `summary` reduces everything to one small vector, still on the device, so that many
tensors cross to the host in one transfer (`to_host`).

Moments are those of rows (tokens or output channels), pooled in float64 (moments.py), so the split
into chunks changes results by float64 rounding alone.

Quantiles and outliers come from a histogram of 10 mantissa bits (histogram.py): quantiles of |x|
within 0.05 %; `outlier_share` to the precision of a bin, null where that is wider than 2 sigma.

Tokens. First tokens of sequences are pooled apart from the others, and the TOP_TOKENS tokens with
the largest |x| are kept one by one, so that leaving them out subtracts nothing from large sums.
"The top 1 %" is 1 % of the tokens, rounded up, and at the most TOP_TOKENS of them: beyond 102,400
tokens it is the top 1,024. Ties go to the token seen first.

Errors. Squared quantization error over squared norm, squares in float32 (so |x| between 1e-15 and
1e15), sums in float64. Formats with one scale per tensor take it from each chunk. Each kept token
keeps its squared errors, so that the share of the top 1 % of the tokens is known at the end.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitplan.formats import Format, Operand, parse_format
from bitplan.probe.histogram import read_histogram
from bitplan.probe.moments import moments_of, pool, shape_of
from bitplan.probe.onepass import ROW, one_pass, passes
from bitplan.probe.totals import Totals, empty_totals

TOP = 8
TOP_TOKENS = 1024
TOP_SHARE = 0.01
OUTLIER_SIGMAS = 6.0
_PENDING_ROWS = 1 << 14
QUANTILES = {"abs_p50": 0.5, "abs_p99": 0.99, "abs_p999": 0.999}

_SCALARS = (
    "count",
    "mean",
    "std",
    "skewness",
    "kurtosis",
    "absmax",
    "rms",
    *QUANTILES,
    "outlier_share",
    "channel_rms_kurtosis",
    "kurtosis_without_first_token",
    "kurtosis_without_top_tokens",
    "nan_count",
    "inf_count",
)
_COUNTS = ("count", "nan_count", "inf_count")
# Columns of a row that is kept: five of moments.py, its place, its largest |x|, and its squared
# error in each format.
_N, _MEAN = 0, 1
_FIRST, _SEQUENCE, _ABSMAX, _ERRORS = 5, 6, 8, 9
_ROW_ABSMAX = ROW - 1  # where a row of a pass has its largest |x|, after its moments


@dataclass(frozen=True)
class _Rows:
    """Rows of a pass, and what tells their places: sequences of one length, or numbers."""

    found: Tensor
    length: int | None = None
    start: int = 0  # number of the first sequence
    positions: Tensor | None = None
    sequences: Tensor | None = None

    def after(self, sequences: int) -> "_Rows":
        """Return the same rows, seen after so many sequences."""
        return replace(self, start=self.start + sequences)

    @property
    def kind(self) -> tuple[int, ...] | None:
        """What rows have in common whose places are the same; None where places were given."""
        if self.positions is not None or self.sequences is not None:
            return None
        return len(self.found), self.length or 0, self.start

    def places(self, device: torch.device) -> Tensor:
        """Say which rows are first tokens, with sequence and position, [rows, 3]."""
        if self.length is not None:
            order = torch.arange(len(self.found), device=device)
            position, sequence = order % self.length, order // self.length + self.start
        else:
            unknown = torch.full((len(self.found),), -1, device=device)
            position = unknown if self.positions is None else self.positions.flatten().to(device)
            sequence = unknown if self.sequences is None else self.sequences.flatten().to(device)
            sequence = sequence + self.start * (sequence >= 0)
        return torch.stack([position == 0, sequence, position], dim=1).double()


class TensorStats:
    """Statistics of one tensor, an input or a weight, gathered chunk by chunk on its device.

    `channel_absmax` and `channel_rms` are [in_features]; everything else comes from `row`,
    `errors` or, many tensors at a time, from `summary` and `to_host`. pending_rows: how many rows
    wait to be settled (`settle`).
    """

    def __init__(
        self,
        in_features: int,
        *,
        operand: Operand,
        formats: Sequence[Format] = (),
        device: torch.device | str = "cpu",
        pending_rows: int = _PENDING_ROWS,
    ) -> None:
        self.in_features = in_features
        self.operand: Operand = operand
        self.formats = tuple(fmt for fmt in formats if fmt.applies_to(operand))
        self.device = torch.device(device)
        self.pending_rows = pending_rows
        self.rows = 0
        self.sequences = 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        self._histogram, self._absmax, self._squares, self._counts, self._nonfinite = empty_totals(
            in_features, self.device
        )
        self._pending: list[_Rows] = []  # seen, and in nothing of what follows: see settle
        self._settled = False
        self._pooled = zeros(2, 5)  # moments of the tokens not kept: the others, the first ones
        self._top = zeros(0, _ERRORS + len(self.formats))  # the tokens kept, by falling |x|
        # Squared error by format: of all tokens, of first ones.
        self._errors, self._first_errors = zeros(2, len(self.formats))

    @property
    def _totals(self) -> Totals:
        return Totals(self._histogram, self._absmax, self._squares, self._counts, self._nonfinite)

    @property
    def channel_absmax(self) -> Tensor:
        """Largest |x| of each input channel, [in_features]."""
        return self._absmax

    @property
    def channel_rms(self) -> Tensor:
        """Root mean square of each input channel, [in_features], float64."""
        return (self._squares / self._counts.clamp_min(1)).sqrt()

    @torch.no_grad()
    def update(
        self, x: Tensor, *, positions: Tensor | None = None, sequences: Tensor | None = None
    ) -> None:
        """Take in a chunk [..., in_features]; no value of it reaches the host.

        An input [batch, tokens, in_features] holds whole sequences, numbered in the order seen. For
        other layouts give each row's position and sequence number ([rows], integer); without them
        no row counts as a first token and top tokens have position -1.
        """
        rows = x.detach().reshape(-1, self.in_features)
        if rows.shape[0] == 0:
            return
        found = one_pass(rows, self.formats, self._totals)
        if positions is None and self.operand == "input" and x.dim() == 3:
            pending = _Rows(found, length=x.shape[1], start=self.sequences)
            self.sequences += x.shape[0]
        else:
            pending = _Rows(found, positions=positions, sequences=sequences)
        self._take(pending)

    def _take(self, rows: _Rows) -> None:
        self._pending.append(rows)
        self.rows += len(rows.found)
        if sum(len(pending.found) for pending in self._pending) > self.pending_rows:
            settle([self])

    def merge(self, other: "TensorStats") -> None:
        """Take in what `other` has seen, as if its chunks had come after those seen here."""
        if (other.in_features, other.operand, other.formats) != (
            self.in_features,
            self.operand,
            self.formats,
        ):
            raise ValueError("only statistics of one shape, operand and formats merge")
        if other._settled:
            settle([self])
            top = other._top.to(self.device, copy=True)
            top[:, _SEQUENCE] += self.sequences * (top[:, _SEQUENCE] >= 0)
            self._pooled = pool(torch.stack([self._pooled, other._pooled.to(self.device)], dim=1))
            self._top, self._pooled = _kept(self.operand, self._top, self._pooled, top)
            self._errors += other._errors.to(self.device)
            self._first_errors += other._first_errors.to(self.device)
        self._pending += [rows.after(self.sequences) for rows in other._pending]
        theirs = Totals(*(total.to(self.device) for total in other._totals))
        torch.maximum(self._absmax, theirs.absmax, out=self._absmax)
        for mine, added in zip(self._totals, theirs, strict=True):
            if mine is not self._absmax:
                mine += added
        self.rows += other.rows
        self.sequences += other.sequences

    def joined(self, other: "TensorStats") -> "TensorStats":
        """Return new statistics of what both have seen, `other` after `self`."""
        result = TensorStats(
            self.in_features, operand=self.operand, formats=self.formats, device=self.device
        )
        result.merge(self)
        result.merge(other)
        return result

    @torch.no_grad()
    def summary(self) -> "Summary":
        """Reduce all of it to one vector on the device; the host does not wait."""
        settle([self])
        total = pool(torch.cat([self._pooled, self._top[:, :5]]))
        std, skewness, kurtosis = shape_of(total)
        excluded = min(math.ceil(TOP_SHARE * self.rows), TOP_TOKENS)
        others = self._top[:, :5] * (1 - self._top[:, _FIRST, None])
        without_first = pool(torch.cat([self._pooled[:1], others]))
        without_top = pool(torch.cat([self._pooled[:1], others[excluded:]]))
        absmax = self._absmax.max().double()
        quantiles, outliers = read_histogram(
            self._histogram,
            tuple(QUANTILES.values()),
            total=total[_N],
            mean=total[_MEAN],
            distance=OUTLIER_SIGMAS * std,
        )
        is_input = self.operand == "input"
        scalars = {
            "count": total[_N],
            "mean": total[_MEAN],
            "std": std,
            "skewness": skewness,
            "kurtosis": kurtosis,
            "absmax": absmax,
            "rms": (std**2 + total[_MEAN] ** 2).sqrt(),
            **dict(zip(QUANTILES, quantiles.minimum(absmax), strict=True)),
            "outlier_share": outliers,
            "channel_rms_kurtosis": shape_of(moments_of(self.channel_rms))[2],
            "kurtosis_without_first_token": shape_of(without_first)[2],
            "kurtosis_without_top_tokens": shape_of(without_top)[2],
            "nan_count": self._nonfinite[0],
            "inf_count": self._nonfinite[1],
        }
        rms, channel = self.channel_rms.sort(descending=True, stable=True)
        channels = torch.stack([channel.double(), self._absmax[channel].double(), rms], dim=1)
        tokens = self._top[:, _SEQUENCE:_ERRORS]
        vector = torch.cat(
            [
                torch.stack([scalars[name] for name in _SCALARS]),
                self._errors / self._squares.sum(),
                self._top[:excluded, _ERRORS:].sum(0) / self._errors,
                self._first_errors / self._errors,
                channels[:TOP].flatten(),
                tokens[:TOP].flatten(),
            ]
        )
        return Summary(
            vector=vector,
            formats=tuple(fmt.name for fmt in self.formats),
            channels=min(TOP, self.in_features),
            tokens=self.rows if is_input else None,
        )

    def row(self) -> dict[str, Any]:
        """Return the statistic columns of tables.PROFILE."""
        return self.summary().row()

    def errors(self) -> dict[str, float]:
        """Return squared quantization error over squared norm by format name; NaN for zeros."""
        return self.summary().errors()


@torch.no_grad()
def update_all(stats: Sequence[TensorStats], tensors: Sequence[Tensor]) -> None:
    """Take in a tensor [rows, in_features] for each, as `update`; many are read together."""
    alike: dict[Any, list[tuple[TensorStats, Tensor]]] = {}
    for one, x in zip(stats, tensors, strict=True):
        if len(x):
            alike.setdefault((one.formats, x.dtype, x.device), []).append((one, x.detach()))
    for (formats, _, _), group in alike.items():
        found = passes([x for _, x in group], formats, [one._totals for one, _ in group])
        for (one, _), rows in zip(group, found, strict=True):
            one._take(_Rows(rows))


@torch.no_grad()
def settle(stats: Sequence[TensorStats]) -> None:
    """Take in the rows that are pending: pool them, or keep them while they are top tokens.

    Rows wait in the order seen, until a summary or until they are many, as this takes some fifty
    small operations; they are done once for all tensors that saw as many rows in the same places.
    """
    groups: dict[Any, list[TensorStats]] = {}
    for one in dict.fromkeys(stats):  # linears share what they are handed
        if one._pending:
            kinds = tuple(rows.kind for rows in one._pending)
            alike = one._settled, len(one._top), id(one) if None in kinds else 0
            key = one.device, one.operand, len(one.formats), kinds, alike
            groups.setdefault(key, []).append(one)
    for group in groups.values():
        device = group[0].device
        # Columns first: with rows first, to read one column of all rows is to read all of them.
        found = torch.cat([rows.found.to(device).mT for one in group for rows in one._pending], 1)
        found = found.view(len(found), len(group), -1)
        errors = found[ROW:].sum(-1).mT
        if group[0].operand == "input":
            top, pooled, first_errors = _sorted_out(found, group[0]._pending)
        else:
            top = found.new_zeros(len(group), 0, _ERRORS + len(found) - ROW)
            pooled = pool(found[:_ROW_ABSMAX].movedim(0, -1))
            pooled = torch.stack([pooled, torch.zeros_like(pooled)], dim=1)
            first_errors = torch.zeros_like(errors)
        if group[0]._settled:
            before = torch.stack([one._pooled for one in group])
            pooled = pool(torch.stack([before, pooled], dim=2))
            before = torch.stack([one._top for one in group])
            top, pooled = _kept(group[0].operand, before, pooled, top)
            # Not in place: what was gathered in inference mode may be settled outside of it.
            errors = torch.stack([one._errors for one in group]) + errors
            first_errors = torch.stack([one._first_errors for one in group]) + first_errors
        states = (values.unbind() for values in (top, pooled, errors, first_errors))
        for one, *state in zip(group, *states, strict=True):
            one._top, one._pooled, one._errors, one._first_errors = state
            one._pending, one._settled = [], True


def _sorted_out(found: Tensor, pending: Sequence[_Rows]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top tokens of many, the others pooled, and the squared errors of first tokens.

    found: [columns, sites, rows]; pending: what tells their places, the same for all sites.
    """
    device = found.device
    where = torch.cat([rows.places(device) for rows in pending]).mT
    order = found[_ROW_ABSMAX].float().sort(dim=-1, descending=True, stable=True).indices
    order = order[:, :TOP_TOKENS]
    rest = torch.ones_like(found[0]).scatter_(1, order, 0)
    picked = found.gather(2, order.expand(len(found), -1, -1))
    top = torch.cat([picked[:_ROW_ABSMAX], where[:, order], picked[_ROW_ABSMAX:]]).movedim(0, -1)
    others = found[:_ROW_ABSMAX] * (rest * (1 - where[0]))
    # First tokens are few, and lie where the sequences begin.
    places = torch.cat(_beginnings(pending, device))
    first = found[:, :, places] * where[0, places]
    parts = [others, first[:_ROW_ABSMAX] * rest[:, places]]
    pooled = torch.stack([pool(part.movedim(0, -1)) for part in parts], dim=1)
    return top, pooled, first[ROW:].sum(-1).mT


def _beginnings(pending: Sequence[_Rows], device: torch.device) -> list[Tensor]:
    """Return the numbers of the rows that may be first tokens, among all that are pending."""
    found, end = [], 0
    for rows in pending:
        start, end = end, end + len(rows.found)
        last = start if rows.length is None and rows.positions is None else end
        found.append(torch.arange(start, last, rows.length or 1, device=device))
    return found


def _kept(operand: Operand, top: Tensor, pooled: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top tokens with `rows` among them, and what was pooled with those that are not.

    top: [..., tokens, 9 + formats]; pooled: [..., 2, 5]; rows: [..., rows, 9 + formats].
    """
    if operand == "input":
        rows = torch.cat([top, rows], dim=-2)
        order = rows[..., _ABSMAX].sort(dim=-1, descending=True, stable=True).indices
        rows = rows.gather(-2, order[..., None].expand_as(rows))
        top, rows = rows[..., :TOP_TOKENS, :], rows[..., TOP_TOKENS:, :]
    first = rows[..., _FIRST, None]
    split = torch.stack([rows[..., :5] * (1 - first), rows[..., :5] * first], dim=-3)
    return top, pool(torch.cat([pooled[..., None, :], split], dim=-2))


@dataclass(frozen=True)
class Summary:
    """A tensor's statistics as one float64 vector, which `row` and `errors` read on the host."""

    vector: Tensor
    formats: tuple[str, ...]
    channels: int
    tokens: int | None

    def row(self) -> dict[str, Any]:
        """Return the statistic columns of tables.PROFILE; what is undefined is None."""
        values = self.vector.tolist()
        row: dict[str, Any] = {
            name: _finite(value) for name, value in zip(_SCALARS, values, strict=False)
        }
        row |= {name: int(row[name] or 0) for name in _COUNTS} | {"tokens": self.tokens}
        if row["count"] == 0:
            row |= dict.fromkeys(name for name in _SCALARS if name not in _COUNTS)
        if row["kurtosis"] is not None:
            row["excess_kurtosis"] = row["kurtosis"] - 3
        row["max_over_median"] = _ratio(row["absmax"], row["abs_p50"])
        row["max_over_rms"] = _ratio(row["absmax"], row.pop("rms"))
        if self.tokens is None:
            row["kurtosis_without_first_token"] = row["kurtosis_without_top_tokens"] = None
        start = len(_SCALARS) + 3 * len(self.formats)
        end = start + 3 * self.channels
        row["top_channels"] = [
            {"channel": int(channel), "absmax": absmax, "rms": rms}
            for channel, absmax, rms in _triples(values[start:end])
        ]
        row["top_tokens"] = [
            {"sequence": int(sequence), "position": int(position), "absmax": absmax, "text": None}
            for sequence, position, absmax in _triples(values[end:])
        ]
        return row

    def errors(self) -> dict[str, float]:
        """Return squared quantization error over squared norm by format name; NaN for zeros."""
        start = len(_SCALARS)
        values = self.vector[start : start + len(self.formats)].tolist()
        return dict(zip(self.formats, values, strict=True))

    def error_rows(self) -> list[dict[str, Any]]:
        """Return the columns of tables.ERRORS that are of the tensor alone."""
        start, count = len(_SCALARS), len(self.formats)
        top, first = self.vector[start + count : start + 3 * count].view(2, count).tolist()
        return [
            {
                "format": name,
                "relative_error": _finite(error),
                "sqnr_db": -10 * math.log10(error) if error > 0 else None,
                "top_tokens_error_share": None if self.tokens is None else _finite(top_share),
                "first_tokens_error_share": None if self.tokens is None else _finite(first_share),
            }
            for (name, error), top_share, first_share in zip(
                self.errors().items(), top, first, strict=True
            )
        ]


def to_host(summaries: Sequence[Summary]) -> list[Summary]:
    """Bring summaries to the host in one transfer per device."""
    vectors = fetch([summary.vector for summary in summaries])
    return [replace(s, vector=vector) for s, vector in zip(summaries, vectors, strict=True)]


def fetch(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Bring vectors of one dtype to the host in one transfer per device, in their order."""
    on_host: dict[int, Tensor] = {}
    for device in {vector.device for vector in vectors}:
        here = [i for i, vector in enumerate(vectors) if vector.device == device]
        flat = torch.cat([vectors[i] for i in here]).cpu()
        parts = torch.split(flat, [vectors[i].numel() for i in here])
        on_host |= dict(zip(here, parts, strict=True))
    return [on_host[i] for i in range(len(vectors))]


def stats(tensor: Tensor, formats: Iterable[Format | str] = ()) -> dict[str, Any]:
    """Return the statistic columns of tables.PROFILE for one tensor [..., in_features].

    formats: formats or their names; each that applies to a weight is a key too, with the relative
    quantization error.
    """
    parsed = [parse_format(fmt) if isinstance(fmt, str) else fmt for fmt in formats]
    found = TensorStats(tensor.shape[-1], operand="weight", formats=parsed, device=tensor.device)
    found.update(tensor)
    summary = found.summary()
    return summary.row() | summary.errors()


def _triples(values: Sequence[float]) -> Iterable[tuple[float, float, float]]:
    return zip(values[::3], values[1::3], values[2::3], strict=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None
