"""Where the outliers are, aggregated to what the section shows: tokens, channels, findings.

Frames in, frames out, as in summary.py. Linears that share an input are one input here.
"""

import polars as pl

from bitplan.reports import summary

MOST_INPUTS = 10
MOST_TOKENS = 8
MOST_CHANNELS = 12
RESIDUAL_ROLES = ("qkv", "fc1")
COUNTED = {
    "kurtosis": "all tokens",
    "kurtosis_without_first_token": "without first tokens",
    "kurtosis_without_top_tokens": "without first and top 1 % of tokens",
}
SHARES = ("first_tokens_error_share", "top_tokens_error_share")


def distinct_inputs(profile: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of inputs in blocks, one for linears that share theirs, heaviest first."""
    return (
        summary.last_step(profile)
        .filter(
            pl.col("operand") == "input",
            pl.col("block").is_not_null(),
            pl.col("kurtosis").is_not_null(),
        )
        .sort("kurtosis", "site", descending=[True, False])
        .unique(pl.coalesce("fused", "module"), keep="first", maintain_order=True)
    )


def token_inputs(inputs: pl.DataFrame, errors: pl.DataFrame | None) -> pl.DataFrame:
    """Return the inputs with the heaviest tails: kurtosis with and without first and top tokens.

    inputs: from `distinct_inputs`. Columns: role, block, expert, the three kurtoses, tokens (which
    are the strongest, spelled visibly), and where errors.parquet has them the tokens' shares of the
    quantization error at the lowest format.
    """
    heaviest = inputs.head(MOST_INPUTS)
    tokens = pl.Series(
        "tokens", [_spell(row) for row in heaviest["top_tokens"].to_list()], pl.String
    )
    found = heaviest.select("site", "role", "block", "expert", *COUNTED).with_columns(tokens)
    known = [name for name in SHARES if errors is not None and name in errors.columns]
    if known:
        assert errors is not None
        last = summary.last_step(errors)
        low = summary.lowest_format(last["format"])
        found = found.join(
            last.filter(pl.col("format") == low).select("site", *known),
            on="site",
            how="left",
            maintain_order="left",
        )
    return found.drop("site")


def _spell(tokens: list[dict[str, object]] | None) -> str | None:
    """Spell the two strongest different tokens and their positions."""
    seen = dict.fromkeys(
        f"{summary.visible(str(token['text']))} at {token['position']}"
        for token in tokens or ()
        if token["text"] is not None
    )
    return ", ".join(list(seen)[:2]) or None


def token_points(found: pl.DataFrame) -> pl.DataFrame:
    """Return `token_inputs` as points: input (its name), counted (which tokens), kurtosis."""
    rows = [
        {
            "input": input_name(row),
            "counted": name,
            "kurtosis": row[column],
            "tokens": row["tokens"],
        }
        for row in found.iter_rows(named=True)
        for column, name in COUNTED.items()
        if row[column] is not None
    ]
    schema = {
        "input": pl.String,
        "counted": pl.String,
        "kurtosis": pl.Float64,
        "tokens": pl.String,
    }
    return pl.DataFrame(rows, schema=schema)


def input_name(row: dict[str, object]) -> str:
    """Name an input by role, block and expert."""
    expert = "" if row.get("expert") is None else f", expert {row['expert']}"
    return f"{row['role']}, block {row['block']}{expert}"


def strong_tokens(inputs: pl.DataFrame) -> pl.DataFrame:
    """Return the tokens that lead the most inputs.

    Columns: token (spelled visibly), at (the start of a sequence or later), strongest_in (inputs
    that it leads), absmax (over those inputs).
    """
    first = pl.col("top_tokens").list.get(0, null_on_oob=True)
    return (
        inputs.select(
            first.struct.field("text").alias("token"),
            first.struct.field("position").alias("position"),
            first.struct.field("absmax").alias("absmax"),
        )
        .filter(pl.col("token").is_not_null())
        .with_columns(
            pl.col("token").map_elements(summary.visible, return_dtype=pl.String),
            at=pl.when(pl.col("position") == 0)
            .then(pl.lit("start of a sequence"))
            .otherwise(pl.lit("later")),
        )
        .group_by("token", "at")
        .agg(strongest_in=pl.len(), absmax=pl.col("absmax").max())
        .sort("strongest_in", "token", "at", descending=[True, False, False])
        .head(MOST_TOKENS)
    )


def channel_cells(inputs: pl.DataFrame) -> pl.DataFrame:
    """Return the channels that stick out in most inputs of qkv and fc1, a row a (channel, block).

    Columns: channel, block, roles, stability (the larger of the roles'), absmax, inputs (how many
    in all have the channel among their top).
    """
    top = (
        inputs.filter(pl.col("role").is_in(RESIDUAL_ROLES), pl.col("expert").is_null())
        .select("role", "block", "top_channels")
        .explode("top_channels")
        .unnest("top_channels")
        .filter(pl.col("channel").is_not_null())
        .with_columns(inputs=pl.len().over("channel"))
    )
    most = (
        top.group_by("channel")
        .agg(pl.col("inputs").first(), pl.col("rms").max())
        .sort("inputs", "rms", "channel", descending=[True, True, False])
        .head(MOST_CHANNELS)["channel"]
    )
    return (
        top.filter(pl.col("channel").is_in(most.implode()))
        .group_by("channel", "block")
        .agg(
            pl.col("role").unique().sort().str.join(", ").alias("roles"),
            pl.col("stability", "absmax").max(),
            pl.col("inputs").first(),
        )
        .sort("inputs", "channel", "block", descending=[True, False, False])
    )


def channel_roles(inputs: pl.DataFrame) -> pl.DataFrame:
    """Return by role how far the top channels stay the same.

    Columns: role, inputs, stability and overlap (medians), by_chance (8 of that many channels).
    """
    return (
        inputs.filter(pl.col("top_channel_stability").is_not_null())
        .group_by("role")
        .agg(
            pl.len().alias("inputs"),
            pl.col("top_channel_stability").median().alias("stability"),
            pl.col("top_channel_overlap").median().alias("overlap"),
            (pl.col("top_channels").list.len() / pl.col("in_features")).median().alias("by_chance"),
        )
        .sort(pl.col("role").map_elements(summary.role_rank, return_dtype=pl.Int64), "role")
    )


def alignment(profile: pl.DataFrame) -> pl.DataFrame:
    """Return block, expert, mean and largest |cosine| of gate and up rows, the largest first."""
    return (
        summary.last_step(profile)
        .filter(
            pl.col("operand") == "weight",
            pl.col("gate_up_correlation").is_not_null(),
        )
        .unique(pl.coalesce("fused", "module"), keep="first", maintain_order=True)
        .select("block", "expert", "gate_up_correlation", "gate_up_correlation_max")
        .sort("gate_up_correlation_max", "block", descending=[True, False], nulls_last=True)
    )
