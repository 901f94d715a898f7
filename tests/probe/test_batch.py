"""Many statistics reduced together are what each is alone."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.formats import Operand, parse_formats
from bitplan.probe.batch import EXTRAS, MAXIMA, read, reset, site_order, stack
from bitplan.probe.tensor_stats import Summary, TensorStats

FORMATS = parse_formats(["int4-g4", "int8-token", "int8-channel"])


def tensors(operand: Operand, widths: list[int], rows: int, chunks: int, seed: int) -> Any:
    """Chunks of several tensors with outliers, ties, zeros and values that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows) if operand == "input" else (rows,)
    found = []
    for width in widths:
        some = [torch.randn(*shape, width, generator=generator) for _ in range(chunks)]
        for x in some:
            x[..., 0] *= 50
            x[..., : rows // 3, :] = 1.0
        if seed % 3 == 0 and rows:
            some[0][..., -1, 0] = math.nan
            some[-1][..., -1, -1] = math.inf
        found.append(some)
    return found


def stats_of(operand: Operand, chunks: list[Tensor]) -> TensorStats:
    found = TensorStats(chunks[0].shape[-1], operand=operand, formats=FORMATS)
    for chunk in chunks:
        found.update(chunk)
    return found


def nothing(sites: int) -> tuple[Tensor, Tensor]:
    """Return extras and maxima of sites that have none."""
    return torch.zeros(sites, len(EXTRAS), 2), torch.full((sites, len(MAXIMA)), -1.0)


def together(stats: list[TensorStats]) -> list[tuple[Summary, dict[str, float]] | None]:
    vectors = stack(stats, [True] * len(stats), *nothing(len(stats))).vectors()
    return [
        read(vector, s.operand, s.in_features, [fmt.name for fmt in s.formats])
        for vector, s in zip(vectors, stats, strict=True)
    ]


def assert_same(found: Summary, want: Summary) -> None:
    assert (found.formats, found.channels, found.tokens) == (
        want.formats,
        want.channels,
        want.tokens,
    )
    torch.testing.assert_close(found.vector, want.vector, rtol=1e-9, atol=1e-12, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.lists(st.sampled_from([4, 8, 12]), max_size=4),
    weights=st.lists(st.sampled_from([4, 8, 12]), max_size=4),
    rows=st.sampled_from([0, 1, 3, 40, 600]),
    chunks=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_together_is_as_alone(
    inputs: list[int], weights: list[int], rows: int, chunks: int, seed: int
) -> None:
    if not inputs and not weights:
        return
    of: dict[Operand, list[int]] = {"input": inputs, "weight": weights}
    stats = [
        stats_of(operand, some)
        for operand, widths in of.items()
        for some in tensors(operand, widths, rows, chunks, seed)
    ]
    alone = [
        stats_of(operand, some)
        for operand, widths in of.items()
        for some in tensors(operand, widths, rows, chunks, seed)
    ]
    order = sorted(range(len(stats)), key=lambda i: site_order(stats[i]))
    found = together([stats[i] for i in order])
    for i, one in zip(order, found, strict=True):
        assert one is not None
        assert_same(one[0], alone[i].summary())
        assert all(math.isnan(value) for value in one[1].values())


def test_statistics_start_over_in_their_memory() -> None:
    first, second = (tensors("input", [8], rows, 1, seed=2)[0] for rows in (40, 7))
    stats = stats_of("input", first)
    place = stats._totals.histogram.data_ptr()
    together([stats])
    reset([stats])
    for chunk in second:
        stats.update(chunk)
    assert stats._totals.histogram.data_ptr() == place
    assert_same(stats.summary(), stats_of("input", second).summary())


def test_what_was_not_seen_is_none() -> None:
    stats = [TensorStats(4, operand="input")]
    vectors = stack(stats, [False], *nothing(1)).vectors()
    assert read(vectors[0], "input", 4, []) is None


@pytest.mark.parametrize("kept", [None, 1024])
def test_how_many_tokens_are_stacked_changes_nothing(kept: int | None) -> None:
    stats = stats_of("input", tensors("input", [8], 40, 1, seed=4)[0])
    batch = stack([stats], [True], *nothing(1), tokens=kept)
    found = read(batch.vectors()[0], "input", 8, [fmt.name for fmt in stats.formats])
    assert found is not None
    assert_same(found[0], stats.summary())
