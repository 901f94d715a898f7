from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.probe.channels import ChannelStability, channel_overlap, with_stability
from bitplan.probe.tensor_stats import TOP


def naive(x: Tensor) -> list[float]:
    """The sequences in which each channel is among the TOP, then their number."""
    counts = [0.0] * x.shape[-1]
    for sequence in x.double():
        rms = sequence.square().mean(0).sqrt().tolist()
        for channel in sorted(range(len(rms)), key=lambda c: -rms[c])[:TOP]:
            counts[channel] += 1
    return [*counts, float(len(x))]


@settings(max_examples=25, deadline=None)
@given(
    sequences=st.integers(1, 6),
    tokens=st.integers(1, 9),
    channels=st.integers(1, 20),
    cut=st.integers(0, 6),
    seed=st.integers(0, 2**20),
)
def test_counts_are_those_of_a_loop_over_sequences(
    sequences: int, tokens: int, channels: int, cut: int, seed: int
) -> None:
    x = torch.randn(sequences, tokens, channels, generator=torch.Generator().manual_seed(seed))
    whole, rows = ChannelStability(channels), ChannelStability(channels)
    for part in (x[:cut], x[cut:]):
        whole.update(part)
        # The same rows, shuffled: their sequence is all that counts.
        order = torch.randperm(len(part) * tokens)
        number = torch.arange(len(part)).repeat_interleave(tokens)
        rows.update(part.flatten(0, 1)[order], number[order], num_sequences=len(part))
    assert whole.counts().tolist() == naive(x)
    assert rows.counts().tolist() == naive(x)


def test_a_channel_that_stays_and_one_that_comes_once() -> None:
    x = 1 + 0.01 * torch.rand(4, 3, 32, generator=torch.Generator().manual_seed(0))
    x[:, :, 5] = 9
    x[2, :, 6] = 9
    found = ChannelStability(32)
    found.update(x)
    top = [{"channel": 5, "rms": 9.0}, {"channel": 6, "rms": 4.5}]
    row = with_stability({"top_channels": top}, found.counts())
    assert row["top_channels"][0]["stability"] == 1.0
    assert row["top_channels"][1]["stability"] < 1.0
    assert row["top_channel_stability"] == pytest.approx(
        sum(channel["stability"] for channel in row["top_channels"]) / 2
    )
    assert "stability" not in top[0]


def test_sequences_without_a_token_do_not_count() -> None:
    found = ChannelStability(12)
    found.update(torch.ones(3, 12), torch.tensor([4, 4, 1]), num_sequences=6)
    assert found.counts()[-1] == 2


def test_no_token_at_all_is_no_stability() -> None:
    found = ChannelStability(12)
    found.update(torch.ones(0, 12), torch.ones(0, dtype=torch.long), num_sequences=6)
    row: dict[str, Any] = {"top_channels": [{"channel": 0}]}
    assert with_stability(row, found.counts()) == row


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite_is_never_at_the_top(bad: float) -> None:
    x = torch.ones(1, 2, 16)
    x[0, 1, 3] = bad
    found = ChannelStability(16)
    found.update(x)
    assert found.counts()[3] == 0
    assert found.counts()[:-1].sum() == TOP


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 40, 16), 200.0, dtype=torch.float16)  # 40 * 200^2 is beyond float16
    x[..., 4] = 60000.0
    found = ChannelStability(16)
    found.update(x)
    assert found.counts()[4] == 1


def reader(block: int | None, role: str, top: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "site": f"{block}.{role}.{changes.get('module', 'a')}:input",
        "module": f"{block}.{role}",
        "operand": "input",
        "role": role,
        "block": block,
        "expert": None,
        "fused": None,
        "in_features": 64,
        "top_channels": [{"channel": channel} for channel in top],
    } | changes


def test_overlap_is_the_mean_over_the_other_readers() -> None:
    rows = [
        reader(0, "qkv", [1, 2], fused="0:qkv", module="q"),
        reader(0, "qkv", [1, 2], fused="0:qkv", module="k"),
        reader(0, "fc1", [1, 3]),
        reader(1, "qkv", [4, 5]),
        reader(1, "fc2", [1, 2]),
        reader(1, "fc1", [1, 2], expert=0),
        reader(None, "qkv", [1, 2]),
        reader(0, "qkv", [1, 2], operand="weight"),
        reader(2, "qkv", [7, 8], in_features=32),
    ]
    found = channel_overlap(rows)
    # q and k are one reader; fc1 of block 0 shares one of two channels, qkv of block 1 none.
    assert found == {
        "0.qkv.q:input": (1 / 2 + 0) / 2,
        "0.qkv.k:input": (1 / 2 + 0) / 2,
        "0.fc1.a:input": (1 / 2 + 0) / 2,
        "1.qkv.a:input": 0.0,
    }


def test_channels_that_are_the_same_everywhere_overlap_wholly() -> None:
    assert set(channel_overlap([reader(b, "qkv", [3, 9]) for b in range(5)]).values()) == {1.0}


def test_nothing_looks_at_a_value() -> None:
    # A meta tensor has no values: reading one raises.
    found = ChannelStability(16, "meta")
    found.update(torch.empty(2, 4, 16, device="meta"))
    rows = torch.empty(8, dtype=torch.long, device="meta")
    found.update(torch.empty(8, 16, device="meta"), rows, num_sequences=2)
    assert found.counts().device.type == "meta"
