"""From measured linears to the rows of the tables, while their weights are in memory.

Statistics are reduced on their device and come to the host together; what several linears share (a
tied weight, an input) is reduced once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitplan.formats import Format
from bitplan.probe.channels import with_stability
from bitplan.probe.inputs import Inputs
from bitplan.probe.modules import LinearModule
from bitplan.probe.tensor_stats import Summary, TensorStats, fetch, to_host
from bitplan.probe.weights import gate_up_alignment, gate_up_partners
from bitplan.progress import track
from bitplan.sites import site_columns

Row = dict[str, Any]

_EMPTY = {"tokens": 0, "count": 0, "nan_count": 0, "inf_count": 0}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The rows of tables.PROFILE, ERRORS and OUTLIERS."""

    rows: list[Row]
    errors: list[Row]
    outliers: list[Row]


@dataclass(frozen=True)
class _Summaries:
    """Statistics on the host: by weight and by input, and what rows have beside them."""

    weights: dict[str, Summary]
    inputs: dict[str, Summary]
    alignments: dict[str, dict[str, float]]
    channels: dict[str, Tensor]


def _summaries(
    items: Sequence[LinearModule], inputs: Inputs, formats: Sequence[Format]
) -> _Summaries:
    """Measure the weights, and bring everything to the host in one transfer."""
    partners = gate_up_partners([item.linear for item in items])
    by_name = {item.linear.module: item for item in items}
    # A tied head is the embedding's tensor, and linears that share an input share its statistics:
    # each is reduced once.
    weights: dict[str, tuple[int, ...]] = {}
    reduced: dict[tuple[int, ...], Summary] = {}
    alignments: dict[str, dict[str, Tensor]] = {}
    for item in track(items, "profiling weights"):
        name, weight = item.linear.module, item.weight().detach()
        weights[name] = key = (weight.data_ptr(), *weight.shape)
        if key not in reduced:
            stats = TensorStats(
                weight.shape[1], operand="weight", formats=formats, device=weight.device
            )
            stats.update(weight)
            reduced[key] = stats.summary()
        if (partner := partners.get(name)) is not None:
            other = None if partner == name else by_name[partner].weight().detach()
            alignments[name] = gate_up_alignment(weight, other)
    shared = {id(stats): stats for stats in inputs.stats.values()}
    found = to_host([*reduced.values(), *(stats.summary() for stats in shared.values())])
    on_host = dict(zip([*reduced, *((key,) for key in shared)], found, strict=True))
    scalars = [
        value.double().reshape(1) for found in alignments.values() for value in found.values()
    ]
    values = (vector.item() for vector in fetch(scalars))
    return _Summaries(
        weights={name: on_host[key] for name, key in weights.items()},
        inputs={name: on_host[(id(stats),)] for name, stats in inputs.stats.items()},
        alignments={
            name: {column: next(values) for column in found} for name, found in alignments.items()
        },
        channels=inputs.outliers.channels(),
    )


def _rows(items: Sequence[LinearModule], summaries: _Summaries) -> Iterator[dict[str, Any]]:
    """Yield the rows of profile.parquet; an input that nothing reached has counts of zero."""
    for item in items:
        linear = item.linear
        yield (
            summaries.weights[linear.module].row()
            | site_columns(linear, "weight")
            | {"step": 0, **summaries.alignments.get(linear.module, {})}
        )
        if item.has_input:
            seen = summaries.inputs.get(linear.module)
            row = (
                _EMPTY
                if seen is None
                else with_stability(seen.row(), summaries.channels[linear.module])
            )
            yield row | site_columns(linear, "input") | {"step": 0}


def _error_rows(items: Sequence[LinearModule], summaries: _Summaries) -> Iterator[dict[str, Any]]:
    for item in items:
        for operand, found in (("weight", summaries.weights), ("input", summaries.inputs)):
            if (summary := found.get(item.linear.module)) is not None:
                site = {"site": f"{item.linear.module}:{operand}", "step": 0}
                yield from (site | row for row in summary.error_rows())


def tabulate(items: Sequence[LinearModule], inputs: Inputs, *, formats: Sequence[Format]) -> Tables:
    """Make the rows of some linears, whose weights are in memory."""
    summaries = _summaries(items, inputs, formats)
    rows = list(_rows(items, summaries))
    medians = {row["module"]: row.get("abs_p50") for row in rows if row["operand"] == "input"}
    return Tables(
        rows=rows,
        errors=list(_error_rows(items, summaries)),
        outliers=list(inputs.outliers.findings(medians)),
    )


def text_of(ids: Tensor, tokenizer: Any, token: Mapping[str, Any]) -> str | None:
    """Return the text of the token at a sequence and position; None where that is not known."""
    if token["position"] < 0:
        return None
    text: str = tokenizer.decode([int(ids[token["sequence"], token["position"]])])
    return text


def with_texts(
    row: dict[str, Any], text: Callable[[Mapping[str, Any]], str | None]
) -> dict[str, Any]:
    """Return a row whose top tokens carry their text."""
    if row["operand"] == "weight":
        return row | {"top_tokens": None}
    tokens = [token | {"text": text(token)} for token in row.get("top_tokens", ())]
    return row | {"top_tokens": tokens}
