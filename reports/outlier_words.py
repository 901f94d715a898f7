"""The sentences of the section on where the outliers are, computed from what it draws."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from bitplan import findings
from bitplan.reports.numbers import number, percent
from bitplan.reports.outlier_summary import SHARES
from bitplan.reports.words import STANDS_OUT, role_name

# Medians of stability and overlap from which channels count as the same.
_SAME, _PARTLY = 0.7, 0.3
# Above this |cosine| a gate row and its up row are nearly one.
_ALIGNED = 0.9


def tokens(found: pl.DataFrame, inputs: pl.DataFrame) -> str:
    """Say whether a few tokens make the heaviest tail, and of how many inputs that is true."""
    top = found.row(0, named=True)
    expert = "" if top["expert"] is None else f", expert {top['expert']}"
    place = f"the {role_name(top['role'])} input of block {top['block']}{expert}"
    calm = top["kurtosis_without_top_tokens"]
    if calm is None:
        return f"The heaviest tail, {place}, has a kurtosis of {number(top['kurtosis'])}."
    few = calm < top["kurtosis"] / STANDS_OUT
    text = (
        f"A few tokens make the heaviest tail, {place}: kurtosis {number(top['kurtosis'])}, and "
        f"{number(calm)} without the first and the top 1 % of tokens"
        if few
        else f"The heaviest tail, {place}, is not that of a few tokens: kurtosis "
        f"{number(top['kurtosis'])}, still {number(calm)} without the first and the top 1 % of "
        "tokens"
    )
    known = inputs.filter(pl.col("kurtosis_without_top_tokens").is_not_null())
    halved = known.filter(
        pl.col("kurtosis_without_top_tokens") < pl.col("kurtosis") / STANDS_OUT
    ).height
    text += f". Leaving them out halves the kurtosis of {halved:,} of {known.height:,} inputs"
    return text + _shares(top) + "."


def _shares(top: Mapping[str, Any]) -> str:
    first, strongest = (top.get(name) for name in SHARES)
    parts = []
    if strongest is not None:
        parts.append(f"the top tokens carry {percent(strongest)}")
    if first is not None:
        parts.append(f"the first tokens {'carry ' if not parts else ''}{percent(first)}")
    return f"; of its error at the lowest format {' and '.join(parts)}" if parts else ""


def channels(cells: pl.DataFrame, roles: pl.DataFrame, readers: int) -> str:
    """Say whether channels stay the same over the text, and over the blocks."""
    residual = roles.filter(pl.col("overlap").is_not_null())
    if residual.is_empty() or cells.is_empty():
        return "The model has one reader of the residual stream: nothing to compare."
    stable, shared, chance = (
        float(residual[name].mean())  # type: ignore[arg-type]
        for name in ("stability", "overlap", "by_chance")
    )
    top = cells.row(0, named=True)
    steady = "stay the same" if stable >= _SAME else "partly change"
    across = (
        "and are largely the same in every block"
        if shared >= _SAME
        else "and are partly the same from block to block"
        if shared >= _PARTLY
        else "but differ from block to block"
    )
    return (
        f"The largest channels of the residual stream {steady} from sequence to sequence "
        f"({percent(stable)} of the time) {across} ({percent(shared)} in common; "
        f"{percent(chance)} by chance). Channel {top['channel']} is among them in {top['inputs']} "
        f"of {readers} inputs."
    )


def massive(found: pl.DataFrame) -> str:
    """Say whether there are massive activations, what they are, and what they do to a format."""
    if found.is_empty():
        return (
            "None: after no block is a value larger than 100 and than 1,000 times the median of "
            "its sequence."
        )
    row = found.row(0, named=True)
    where = (
        "only on the first tokens of sequences"
        if row["first_tokens"] == row["tokens"]
        else f"on {row['tokens']:,} tokens, {row['first_tokens']:,} of them first in a sequence"
    )
    return (
        f"Values after a block that are larger than 100 and than 1,000 times the median of their "
        f"sequence. Channel {row['channel']} reaches {number(row['value'])}, {where}: per tensor "
        "one such value takes the whole range, so give these tokens a scale of their own."
    )


def super_weights(found: pl.DataFrame) -> str:
    """Say which weights make massive outputs, and that this was not tried by removing them."""
    if found.is_empty():
        return "None: no weight of an FC2 makes a massive output from a spike of its input."
    row = found.row(0, named=True)
    return (
        f"Weights of an FC2 that turn a spike of the input into a massive output. The first makes "
        f"{percent(row['share'])} of an output of {number(row['value'])}. Candidates: what the "
        "model is without them was not measured."
    )


def routing(experts: pl.DataFrame) -> str:
    """Say how uneven routing is, and which cells of the map are experts without a token."""
    text = f"{findings.say_routing(experts)}."
    return text if experts["tokens"].min() else f"{text} Outlined cells are those never routed to."


def alignment(found: pl.DataFrame) -> str:
    """Say how far rows of gate and up point the same way."""
    row = found.row(0, named=True)
    mean = float(found["gate_up_correlation"].mean())  # type: ignore[arg-type]
    text = f"Mean |cosine| of matching gate and up rows: {mean:.2f}"
    if row["gate_up_correlation_max"] is None:
        return f"{text}."
    largest = row["gate_up_correlation_max"]
    where = "" if row["block"] is None else f" in block {row['block']}"
    tail = (
        ". Where two rows are nearly one, their product is a square, and so are its outliers"
        if largest >= _ALIGNED
        else "; no two rows are near to one"
    )
    return f"{text}; the largest is {largest:.2f}{where}{tail}."
