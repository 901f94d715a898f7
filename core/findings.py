"""What a profile found, summed up the same way for the terminal and for the report.

Frames of outliers.parquet and profile.parquet in; small frames and plain sentences out.
"""

from collections.abc import Iterator, Sequence

import polars as pl

SUPER_WEIGHT, MASSIVE = "super_weight", "massive_activation"
# Findings that are spelled out; the files have them all.
_LISTED = 4


def massive_channels(outliers: pl.DataFrame) -> pl.DataFrame:
    """Return a row a channel with massive activations, the largest first.

    Columns: channel, blocks (list), value, value_over_median, tokens, first_tokens (the most after
    any block), text and position of the largest.
    """
    found = outliers.filter(pl.col("kind") == MASSIVE)
    largest = pl.col("value", "value_over_median", "position", "text")
    return (
        found.group_by("channel")
        .agg(
            pl.col("block").unique().sort().alias("blocks"),
            largest.sort_by(pl.col("value").abs(), descending=True).first(),
            pl.col("tokens", "first_tokens").sort_by("tokens", descending=True).first(),
        )
        .sort(pl.col("value").abs(), "channel", descending=[True, False])
        .select(
            "channel",
            "blocks",
            "value",
            "value_over_median",
            "tokens",
            "first_tokens",
            "position",
            "text",
        )
    )


def super_weights(outliers: pl.DataFrame) -> pl.DataFrame:
    """Return the super-weight candidates, those that make the largest outputs first.

    Columns: module, row, column, weight, input_value, value, share.
    """
    return (
        outliers.filter(pl.col("kind") == SUPER_WEIGHT)
        .sort((pl.col("value") * pl.col("share")).abs(), "module", descending=[True, False])
        .select(
            "module",
            pl.col("channel").alias("row"),
            pl.col("input_channel").alias("column"),
            "weight",
            "input_value",
            "value",
            "share",
        )
    )


def routing(profile: pl.DataFrame) -> pl.DataFrame:
    """Return a row a (block, expert) whose input was looked at: how often it was routed to.

    Columns: block, expert, tokens, share (of the block's routed tokens, null where there are none),
    load (share over an even share). An expert that was never routed to has 0 tokens.
    """
    seen = profile.filter(
        pl.col("operand") == "input",
        pl.col("expert").is_not_null(),
        pl.col("block").is_not_null(),
        pl.col("tokens").is_not_null(),
    )
    total = pl.col("tokens").sum().over("block")
    return (
        seen.group_by("block", "expert")
        .agg(pl.col("tokens").max())
        .with_columns(share=pl.when(total > 0).then(pl.col("tokens") / total))
        .with_columns(load=pl.col("share") * pl.len().over("block"))
        .sort("block", "expert")
    )


def ranges(numbers: Sequence[int]) -> str:
    """Spell ascending integers with their runs joined: 2, 11-27."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def say_massive(channels: pl.DataFrame) -> Iterator[str]:
    """Yield a sentence on each of the first massive channels, as `massive_channels` has them."""
    for row in channels.head(_LISTED).iter_rows(named=True):
        blocks = row["blocks"]
        place = f"block{'s' if len(blocks) > 1 else ''} {ranges(blocks)}"
        tokens = f"{row['tokens']:,} token{'' if row['tokens'] == 1 else 's'}"
        first = row["first_tokens"]
        where = (
            ", all at the start of a sequence"
            if first == row["tokens"]
            else f", {first:,} of them at the start of a sequence"
            if first
            else ""
        )
        yield (
            f"channel {row['channel']} reaches {row['value']:,.0f} after {place}, "
            f"{row['value_over_median']:,.0f} times the median, on {tokens}{where}"
        )
    yield from _more(channels)


def say_super_weights(found: pl.DataFrame) -> Iterator[str]:
    """Yield a sentence on each of the first candidates, as `super_weights` has them."""
    for row in found.head(_LISTED).iter_rows(named=True):
        yield (
            f"{row['module']} [{row['row']}, {row['column']}] = {row['weight']:.4g} makes "
            f"{100 * row['share']:.0f} % of an output of {row['value']:,.0f}"
        )
    yield from _more(found)


def _more(frame: pl.DataFrame) -> Iterator[str]:
    if frame.height > _LISTED:
        yield f"and {frame.height - _LISTED:,} more"


def say_routing(experts: pl.DataFrame) -> str:
    """Say which experts were never routed to and how uneven the rest is; `experts`: `routing`."""
    silent = experts.filter(pl.col("tokens") == 0)
    busiest = experts.sort("load", "block", "expert", descending=[True, False, False]).row(
        0, named=True
    )
    text = (
        f"{silent.height:,} of {experts.height:,} experts were never routed to and have no "
        "statistics"
        if silent.height
        else f"All {experts.height:,} experts were routed to"
    )
    if busiest["load"] is None:
        return text
    return (
        f"{text}; the busiest, expert {busiest['expert']} of block {busiest['block']}, took "
        f"{100 * busiest['share']:.0f} % of the tokens routed in it, "
        f"{busiest['load']:.1f} times an even share"
    )
