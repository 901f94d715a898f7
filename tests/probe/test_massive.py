import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.probe.massive import ABOVE, RATIO, SHARE, MassiveActivations, OutputSpike


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(x: Tensor) -> dict[int, dict[str, float]]:
    """Massive channels by loops over sequences, tokens and channels, in float64."""
    found: dict[int, dict[str, float]] = {}
    for s, sequence in enumerate(x.double()):
        # The lower median of an even number of values, as torch has it.
        magnitudes = sorted(sequence.abs().flatten().tolist())
        median = magnitudes[(len(magnitudes) - 1) // 2]
        for t, row in enumerate(sequence.tolist()):
            for c, value in enumerate(row):
                if abs(value) > ABOVE and abs(value) > RATIO * median:
                    one = found.setdefault(c, {"value": 0.0, "tokens": 0, "first_tokens": 0})
                    one["tokens"] += 1
                    one["first_tokens"] += t == 0
                    if abs(value) > abs(one["value"]):
                        one |= {"value": value, "sequence": s, "position": t}
                        one["value_over_median"] = abs(value) / median
    return found


@settings(max_examples=25, deadline=None)
@given(
    spikes=st.lists(
        st.tuples(
            st.integers(0, 4),
            st.integers(0, 5),
            st.integers(0, 11),
            st.floats(-3e4, 3e4, width=32),
        ),
        max_size=8,
    ),
    cut=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
def test_massive_channels_are_those_of_a_loop(
    spikes: list[tuple[int, int, int, float]], cut: int, seed: int
) -> None:
    x = normal(5, 6, 12, seed=seed)
    x[3] *= 30  # in this sequence it takes more
    for sequence, token, channel, value in spikes:
        x[sequence, token, channel] = value
    found = MassiveActivations(12)
    for first, part in ((0, x[:cut]), (cut, x[cut:])):
        if len(part):
            found.update(part, first)
    rows = list(MassiveActivations.findings(found.vector()))
    want = naive(x)
    largest = sorted((abs(row["value"]) for row in rows), reverse=True)
    assert [abs(row["value"]) for row in rows] == largest
    assert len(rows) == min(8, len(want))
    for row in rows:
        channel = row.pop("channel")
        assert row == {name: pytest.approx(value) for name, value in want[channel].items()}


def test_neither_large_nor_far_from_the_median_alone_is_massive() -> None:
    small, dense = normal(1, 8, 12), 1000 * normal(1, 8, 12)
    small[0, 2, 3] = 99.0
    small *= 1e-3
    small[0, 2, 3] = 99.0  # a hundred thousand times the median, but below ABOVE
    dense[0, 2, 3] = 5e4  # large, but 50 times the median
    found = MassiveActivations(12)
    found.update(small, 0)
    found.update(dense, 1)
    assert list(MassiveActivations.findings(found.vector())) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_massive(bad: float) -> None:
    x = normal(1, 8, 12)
    x[0, 1, 2] = bad
    x[0, 3, 4] = 30000.0
    found = MassiveActivations(12)
    found.update(x, 0)
    (row,) = MassiveActivations.findings(found.vector())
    assert (row["channel"], row["value"]) == (4, 30000.0)


def spike_of(x: Tensor, weight: Tensor, *, positions: bool = True) -> list[dict[str, float]]:
    """Findings for an input [sequences, tokens, in] of a linear, seen in two batches."""
    found = OutputSpike(x.shape[-1])
    for first in (0, 1):
        part = x[first : first + 1]
        rows = torch.arange(x.shape[1])
        found.update(
            part, part @ weight.T, torch.full_like(rows, first), rows if positions else None
        )
    return list(OutputSpike.findings(found.vector(weight), float(x.abs().median())))


def test_a_planted_super_weight_is_found_with_both_spikes() -> None:
    x, weight = 0.1 * normal(2, 16, 48), 0.01 * normal(24, 48, seed=1)
    x[1, 5, 7] = -400.0
    weight[3, 7] = 2.0
    (row,) = spike_of(x, weight)
    assert (row["channel"], row["input_channel"]) == (3, 7)
    assert (row["sequence"], row["position"]) == (1, 5)
    assert row["weight"] == 2.0
    assert row["input_value"] == -400.0
    y = float(weight[3] @ x[1, 5])
    assert row["value"] == pytest.approx(y)
    assert row["share"] == pytest.approx(2.0 * -400.0 / y)
    assert row["input_over_median"] == pytest.approx(400 / float(x.abs().median()))


def test_two_weights_that_make_one_spike_are_both_found() -> None:
    x, weight = 0.1 * normal(2, 16, 48), 0.01 * normal(24, 48, seed=1)
    x[0, 0, 7], x[0, 0, 9] = 300.0, -300.0
    weight[3, 7], weight[3, 9] = 2.0, -1.0
    rows = spike_of(x, weight)
    assert [row["input_channel"] for row in rows] == [7, 9]
    assert [round(row["share"], 1) for row in rows] == [0.7, 0.3]
    assert all(row["share"] >= SHARE for row in rows)


def test_an_output_that_many_weights_make_has_no_super_weight() -> None:
    x, weight = 0.1 * normal(2, 16, 48), 0.01 * normal(24, 48, seed=1)
    x[0, 4] = 200.0
    weight[3] = 0.5
    assert spike_of(x, weight) == []


def test_a_spike_of_the_input_alone_is_none() -> None:
    x, weight = 0.1 * normal(2, 16, 48), 0.01 * normal(24, 48, seed=1)
    x[0, 4, 7] = 400.0
    weight[:, 7] = 0.0
    assert spike_of(x, weight) == []


def test_without_places_the_position_is_unknown() -> None:
    x, weight = 0.1 * normal(2, 16, 48), 0.01 * normal(24, 48, seed=1)
    x[0, 4, 7] = 400.0
    weight[3, 7] = 2.0
    (row,) = spike_of(x, weight, positions=False)
    assert row["position"] == -1


def test_no_row_at_all_is_no_finding() -> None:
    found = OutputSpike(8)
    none = torch.zeros(0, dtype=torch.long)
    found.update(torch.zeros(0, 8), torch.zeros(1, 0, 4), none, none)
    assert list(OutputSpike.findings(found.vector(torch.ones(4, 8)), 1.0)) == []


def test_nothing_looks_at_a_value() -> None:
    # A meta tensor has no values: reading one raises.
    hidden, spike = MassiveActivations(12, "meta"), OutputSpike(16, "meta")
    rows = torch.empty(8, dtype=torch.long, device="meta")
    x, y = torch.empty(2, 4, 16, device="meta"), torch.empty(2, 4, 12, device="meta")
    hidden.update(y, 0)
    spike.update(x, y, rows, rows)
    assert hidden.vector().device.type == "meta"
    assert spike.vector(torch.empty(12, 16, device="meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_cuda_agrees_and_never_waits() -> None:
    x, weight = 0.1 * normal(2, 16, 48), 0.01 * normal(24, 48, seed=1)
    x[1, 5, 7], weight[3, 7] = -400.0, 2.0
    rows = torch.arange(32)
    rows_of = []
    for device in ("cpu", "cuda"):
        there, matrix, places = (t.to(device) for t in (x, weight, rows))
        hidden, spike = MassiveActivations(24, device), OutputSpike(48, device)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            y = there @ matrix.T
            hidden.update(y, 0)
            spike.update(there, y, places // 16, places % 16)
            found = hidden.vector(), spike.vector(matrix)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows_of.append(
            [
                *MassiveActivations.findings(found[0].cpu()),
                *OutputSpike.findings(found[1].cpu(), 0.1),
            ]
        )
    assert len(rows_of[0]) > 1
    assert len(rows_of[0]) == len(rows_of[1])
    for here, there_row in zip(*rows_of, strict=True):
        assert there_row == pytest.approx(here, rel=1e-4)
