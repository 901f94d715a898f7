"""What changed between two checkpoints, or two steps of a training: frames in, a comparison out.

Sites are matched by name, so both must be of one architecture. For each role and operand, and for
kurtosis, absmax and quantization error, the site that changed most (by ratio) stands beside the
medians. Two sets are compared:

    outlier channels   inputs: channels whose rms is above CHANNEL_RMS times that of the tensor
    outlier tokens     inputs: tokens whose largest |x| is above TOKEN_RMS times that of the tensor,
                       only where both profiles read the same text

Both come from the eight largest that a profile keeps. Massive activations and super-weight
candidates are compared where both sides looked for them; drift where the later one recorded it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from bitplan.errors import RunError
from bitplan.formats import parse_format
from bitplan.probe.snapshot import Snapshot
from bitplan.sites import OPERANDS, ROLES

STATISTICS = ("kurtosis", "absmax", "error")
CHANNEL_RMS = 3.0
TOKEN_RMS = 20.0
_LISTED = 5
_NEW, _GONE = "new", "vanished"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What changed from `before` to `after`; frames have only what differs.

    `changes`: role, operand, statistic, sites, median_before, median_after, and site, before, after
    of the one that changed most. `channels`, `tokens`, `findings`: a row a place, with `change` new
    or vanished; None where it could not be compared. `drift`: role, median, largest, site.
    """

    before: str
    after: str
    sites: int
    unchanged: int
    only: tuple[int, int]
    number_format: str | None
    changes: pl.DataFrame
    channels: pl.DataFrame
    tokens: pl.DataFrame | None
    findings: pl.DataFrame | None
    drift: pl.DataFrame

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        frames = ("changes", "channels", "tokens", "findings", "drift")
        found = {name: getattr(self, name) for name in frames}
        return {
            "before": self.before,
            "after": self.after,
            "sites": self.sites,
            "unchanged": self.unchanged,
            "only_before": self.only[0],
            "only_after": self.only[1],
            "format": self.number_format,
        } | {name: None if frame is None else frame.to_dicts() for name, frame in found.items()}

    def as_text(self) -> str:
        """Return a table of what changed most, then what is new or gone."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"A: {self.before}"
        yield f"B: {self.after}"
        if self.tokens is None:
            yield "the inputs are of different text, which is part of their change"
        if self.changes.is_empty():
            yield "no statistic differs"
        else:
            yield from _change_table(self.changes, self.number_format)
        if self.unchanged:
            yield f"unchanged: {self.unchanged:,} of {self.sites:,} sites"
        for count, name in zip(self.only, "AB", strict=True):
            if count:
                yield f"only in {name}: {count:,} sites, not compared"
        channels = f"outlier channels (rms above {CHANNEL_RMS:g} times the tensor's)"
        yield from _set_lines(channels, self.channels, "site", "channel", "over_rms")
        tokens = f"outlier tokens (|x| above {TOKEN_RMS:g} times the tensor's rms)"
        if self.tokens is None:
            yield f"{tokens}: not compared, the text is not the same"
        else:
            yield from _set_lines(tokens, self.tokens, "site", "token", "over_rms")
        if self.findings is None:
            yield "massive activations and super weights: not looked for on both sides"
        else:
            name = "massive activations and super weights"
            yield from _set_lines(name, self.findings, "module", "place", "value")
        for row in self.drift.iter_rows(named=True):
            yield (
                f"drift of {row['role']} weights: median {row['median']:.3g}, largest "
                f"{row['largest']:.3g} at {row['site']} (|W - W0|^2 / |W0|^2)"
            )


def compare(before: Snapshot, after: Snapshot) -> Comparison:
    """Say what changed from one snapshot to another; raise RunError for different models."""
    _check_same_model(before, after)
    number_format = _common_format(before, after)
    frames = [_sites(snapshot, number_format) for snapshot in (before, after)]
    joined = frames[0].join(frames[1], on="site", suffix="_after", maintain_order="left")
    differs = pl.any_horizontal(pl.col(s).ne_missing(pl.col(f"{s}_after")) for s in STATISTICS)
    findings = None
    if before.outliers is not None and after.outliers is not None:
        findings = _finding_changes(before.outliers, after.outliers)
    same_text = before.text is not None and before.text == after.text
    return Comparison(
        before=before.name,
        after=after.name,
        sites=joined.height,
        unchanged=joined.filter(~differs).height,
        only=(frames[0].height - joined.height, frames[1].height - joined.height),
        number_format=number_format,
        changes=_changes(joined),
        channels=_set_changes(_channels(before.profile), _channels(after.profile), "channel"),
        tokens=(
            _set_changes(_tokens(before.profile), _tokens(after.profile), "sequence", "position")
            if same_text
            else None
        ),
        findings=findings,
        drift=_drift(after.profile),
    )


def _check_same_model(before: Snapshot, after: Snapshot) -> None:
    shapes = [
        {row[0]: row[1:] for row in snapshot.profile.select(*_SHAPE).unique().iter_rows()}
        for snapshot in (before, after)
    ]
    if shapes[0] == shapes[1]:
        return
    modules = sorted(shapes[0].keys() | shapes[1].keys())
    odd = next(name for name in modules if shapes[0].get(name) != shapes[1].get(name))
    found = [
        f"[{shape[1]}, {shape[0]}]" if (shape := known.get(odd)) else "absent" for known in shapes
    ]
    raise RunError(
        f"{before.name} and {after.name} are of different models ({len(shapes[0])} and "
        f"{len(shapes[1])} linears): {odd} is {found[0]} in the first, {found[1]} in the second; "
        "compare checkpoints of one architecture"
    )


_SHAPE = ("module", "in_features", "out_features")


def _common_format(before: Snapshot, after: Snapshot) -> str | None:
    """Return the format of fewest bits whose error both sides know."""
    if before.errors is None or after.errors is None:
        return None
    common = set(before.errors["format"]) & set(after.errors["format"])
    return min(common, key=lambda name: (parse_format(name).bits, name), default=None)


def _sites(snapshot: Snapshot, number_format: str | None) -> pl.DataFrame:
    """Return site, role, operand and the STATISTICS of a snapshot."""
    frame = snapshot.profile.select("site", "role", "operand", "kurtosis", "absmax")
    if snapshot.errors is None or number_format is None:
        return frame.with_columns(error=pl.lit(None, pl.Float64))
    errors = snapshot.errors.filter(pl.col("format") == number_format)
    renamed = errors.select("site", pl.col("relative_error").alias("error"))
    return frame.join(renamed, on="site", how="left", maintain_order="left")


def _changes(joined: pl.DataFrame) -> pl.DataFrame:
    """Return the medians and the most changed site by role, operand and statistic."""
    found = []
    for statistic in STATISTICS:
        now = f"{statistic}_after"
        known = joined.filter(pl.col(statistic) > 0, pl.col(now) > 0)
        moved = (pl.col(now) / pl.col(statistic)).log().abs()
        found.append(
            known.sort(moved, "site", descending=[True, False])
            .group_by("role", "operand", maintain_order=True)
            .agg(
                pl.lit(statistic).alias("statistic"),
                pl.len().alias("sites"),
                pl.col(statistic).median().alias("median_before"),
                pl.col(now).median().alias("median_after"),
                pl.col("site").first(),
                pl.col(statistic).first().alias("before"),
                pl.col(now).first().alias("after"),
            )
        )
    order = (pl.Enum(ROLES), pl.Enum(OPERANDS), pl.Enum(STATISTICS))
    return (
        pl.concat(found)
        .filter(pl.col("before") != pl.col("after"))
        .sort(
            pl.col(name).cast(kind)
            for name, kind in zip(("role", "operand", "statistic"), order, strict=True)
        )
    )


def _largest(profile: pl.DataFrame, column: str) -> pl.DataFrame:
    """Return the top channels or tokens of inputs, one row each; shared inputs are one."""
    rms = (pl.col("std") ** 2 + pl.col("mean") ** 2).sqrt()
    return (
        profile.filter(pl.col("operand") == "input")
        .unique(pl.coalesce("fused", "module"), keep="first", maintain_order=True)
        .select("site", "role", column, tensor_rms=rms)
        .explode(column)
        .unnest(column)
    )


def _channels(profile: pl.DataFrame) -> pl.DataFrame:
    """Return the outlier channels of inputs: site, role, channel, over_rms."""
    over = pl.col("rms") / pl.col("tensor_rms")
    return (
        _largest(profile, "top_channels")
        .select("site", "role", "channel", over_rms=over)
        .filter(pl.col("over_rms") > CHANNEL_RMS)
    )


def _tokens(profile: pl.DataFrame) -> pl.DataFrame:
    """Return the outlier tokens of inputs: site, role, sequence, position, token, over_rms."""
    over = pl.col("absmax") / pl.col("tensor_rms")
    return (
        _largest(profile, "top_tokens")
        .filter(pl.col("position") >= 0)
        .select(
            "site",
            "role",
            "sequence",
            "position",
            token=pl.struct("text", "position", "sequence").map_elements(
                _spell, return_dtype=pl.String
            ),
            over_rms=over,
        )
        .filter(pl.col("over_rms") > TOKEN_RMS)
    )


def _spell(token: dict[str, Any]) -> str:
    return f"{token['text']!r} at {token['position']} of sequence {token['sequence']}"


def _set_changes(before: pl.DataFrame, after: pl.DataFrame, *key: str) -> pl.DataFrame:
    """Return the rows that only one side has, with `change`, the strongest first."""
    parts = [
        mine.join(other, on=["site", *key], how="anti").with_columns(change=pl.lit(change))
        for mine, other, change in ((after, before, _NEW), (before, after, _GONE))
    ]
    descending = [False, True, *(False for _ in ("site", *key))]
    return pl.concat(parts).sort("change", "over_rms", "site", *key, descending=descending)


def _finding_changes(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """Return the massive channels and super weights that only one side has, with `change`."""
    key = ["kind", "module", "channel", "input_channel"]
    column = pl.col("input_channel")
    place = (
        pl.when(column.is_null())
        .then(pl.format("channel {}", "channel"))
        .otherwise(pl.format("weight [{}, {}]", "channel", column.fill_null(0)))
    )
    parts = [
        mine.join(other, on=key, how="anti", nulls_equal=True).select(
            "kind", "module", place.alias("place"), "value", change=pl.lit(change)
        )
        for mine, other, change in ((after, before, _NEW), (before, after, _GONE))
    ]
    size = pl.col("value").abs()
    return pl.concat(parts).sort(
        pl.col("change"), size, "module", "place", descending=[False, True, False, False]
    )


def _drift(profile: pl.DataFrame) -> pl.DataFrame:
    """Return by role how far the weights are from the training's first ones."""
    known = profile.filter(pl.col("drift").is_not_null()).sort(
        "drift", "site", descending=[True, False]
    )
    return (
        known.group_by("role", maintain_order=True)
        .agg(
            pl.col("drift").median().alias("median"),
            pl.col("drift").first().alias("largest"),
            pl.col("site").first(),
        )
        .sort(pl.col("role").cast(pl.Enum(ROLES)))
    )


# --- text --------------------------------------------------------------------------------------


def _change_table(changes: pl.DataFrame, number_format: str | None) -> Iterator[str]:
    heads = ("role", "operand", "statistic", "median A", "median B", "most changed A", "B", "ratio")
    rows = [
        (
            row["role"],
            row["operand"],
            f"{number_format} error" if row["statistic"] == "error" else row["statistic"],
            *(_value(row[name], row["statistic"]) for name in ("median_before", "median_after")),
            *(_value(row[name], row["statistic"]) for name in ("before", "after")),
            f"x{row['after'] / row['before']:.4g}",
            row["site"],
        )
        for row in changes.iter_rows(named=True)
    ]
    yield from _aligned([(*heads, "site"), *rows], words=3)


def _value(value: float, statistic: str) -> str:
    if statistic == "error":
        return f"{value:.2%}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _aligned(rows: Sequence[Sequence[str]], *, words: int) -> Iterator[str]:
    """Yield lines of columns: words to the left, numbers to the right, the last one as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row[:-1], widths, strict=False))
        ]
        yield "  ".join([*cells, row[-1]])


def _set_lines(
    title: str, changes: pl.DataFrame, place: str, what: str, size: str
) -> Iterator[str]:
    """Yield a line on how many are new and vanished, and one for each of the strongest."""
    counts = {change: changes.filter(pl.col("change") == change) for change in (_NEW, _GONE)}
    yield f"{title}: {counts[_NEW].height:,} new, {counts[_GONE].height:,} vanished"
    for change, rows in counts.items():
        for row in rows.head(_LISTED).iter_rows(named=True):
            label = row[what] if isinstance(row[what], str) else f"{what} {row[what]}"
            times = f"{row[size]:,.0f}" if size == "value" else f"{row[size]:.1f} times the rms"
            yield f"  {change}: {row[place]} {label}, {times}"
        if rows.height > _LISTED:
            yield f"  {change}: and {rows.height - _LISTED:,} more"
