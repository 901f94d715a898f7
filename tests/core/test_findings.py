import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan import findings
from bitplan.tables import OUTLIERS, PROFILE


def massive(channel: int, block: int, value: float, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "massive_activation",
        "module": f"model.layers.{block}",
        "block": block,
        "channel": channel,
        "value": value,
        "value_over_median": abs(value) / 2,
        "sequence": 0,
        "position": 3,
        "text": "the",
        "tokens": 4,
        "first_tokens": 4,
    } | changes


def super_weight(row: int, column: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "super_weight",
        "module": "model.layers.2.mlp.down_proj",
        "block": 2,
        "channel": row,
        "value": 640.0,
        "input_channel": column,
        "input_value": -69.5,
        "weight": -5.3125,
        "share": 0.58,
    } | changes


def test_a_massive_channel_is_one_row_over_its_blocks() -> None:
    rows = [
        massive(7, 3, -900.0, text="<s>", position=0, tokens=2, first_tokens=1),
        massive(7, 2, 500.0, tokens=9, first_tokens=2),
        massive(8, 2, 1200.0),
        super_weight(1, 2),
    ]
    for seed in range(4):
        random.Random(seed).shuffle(rows)
        first, second = findings.massive_channels(OUTLIERS.frame(rows)).to_dicts()
        assert first["channel"] == 8
        assert second == {
            "channel": 7,
            "blocks": [2, 3],
            "value": -900.0,
            "value_over_median": 450.0,
            "tokens": 9,
            "first_tokens": 2,
            "position": 0,
            "text": "<s>",
        }


@pytest.mark.parametrize(
    ("first", "where"),
    [
        (4, "on 4 tokens, all at the start of a sequence"),
        (1, "on 4 tokens, 1 of them at the start of a sequence"),
        (0, "on 4 tokens"),
    ],
)
def test_the_sentence_on_massive_channels_says_where(first: int, where: str) -> None:
    rows = [massive(507, block, 25805.0, first_tokens=first) for block in (2, 11, 12, 13)]
    (line,) = findings.say_massive(findings.massive_channels(OUTLIERS.frame(rows)))
    assert line == (
        f"channel 507 reaches 25,805 after blocks 2, 11-13, 12,902 times the median, {where}"
    )


def test_super_weights_come_by_what_they_make() -> None:
    rows = [super_weight(3, 5), super_weight(3, 9, share=0.3), super_weight(4, 1, value=9000.0)]
    found = findings.super_weights(OUTLIERS.frame(rows))
    assert found["column"].to_list() == [1, 5, 9]
    lines = list(findings.say_super_weights(found))
    assert lines[1] == (
        "model.layers.2.mlp.down_proj [3, 5] = -5.312 makes 58 % of an output of 640"
    )


def test_many_findings_are_counted_and_not_listed() -> None:
    rows = [massive(c, 1, 200.0 + c) for c in range(7)] + [super_weight(1, c) for c in range(6)]
    frame = OUTLIERS.frame(rows)
    assert list(findings.say_massive(findings.massive_channels(frame)))[-1] == "and 3 more"
    assert list(findings.say_super_weights(findings.super_weights(frame)))[-1] == "and 2 more"


def test_nothing_found_says_nothing() -> None:
    frame = OUTLIERS.frame([])
    assert list(findings.say_massive(findings.massive_channels(frame))) == []
    assert list(findings.say_super_weights(findings.super_weights(frame))) == []
    assert findings.routing(PROFILE.frame([])).is_empty()


def expert(block: int, index: int, leaf: str, tokens: int | None, **changes: Any) -> dict[str, Any]:
    return {
        "site": f"{block}.{index}.{leaf}:input",
        "operand": "input",
        "block": block,
        "expert": index,
        "tokens": tokens,
    } | changes


@given(
    tokens=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=4)
)
def test_routing_is_that_of_a_loop(tokens: Sequence[Sequence[int]]) -> None:
    rows = [
        expert(block, index, leaf, count)
        for block, counts in enumerate(tokens)
        for index, count in enumerate(counts)
        for leaf in ("gate", "up", "down")
    ]
    rows += [
        expert(0, 0, "down", None, operand="weight"),
        expert(0, 0, "router", 99, expert=None),
    ]
    for row in findings.routing(PROFILE.frame(rows)).iter_rows(named=True):
        counts = tokens[row["block"]]
        assert row["tokens"] == counts[row["expert"]]
        if sum(counts):
            assert row["share"] == pytest.approx(counts[row["expert"]] / sum(counts))
            assert row["load"] == pytest.approx(3 * row["share"])
        else:
            assert row["share"] is row["load"] is None


def test_experts_without_a_token_are_said_to_have_none() -> None:
    rows = [expert(0, 0, "up", 30), expert(0, 1, "up", 10), expert(0, 2, "up", 0)]
    said = findings.say_routing(findings.routing(PROFILE.frame(rows)))
    assert said == (
        "1 of 3 experts were never routed to and have no statistics; the busiest, expert 0 of "
        "block 0, took 75 % of the tokens routed in it, 2.2 times an even share"
    )
    assert findings.say_routing(findings.routing(PROFILE.frame(rows[:2]))).startswith(
        "All 2 experts were routed to; the busiest"
    )
    nothing = findings.routing(PROFILE.frame([expert(0, 0, "up", 0)]))
    assert findings.say_routing(nothing) == (
        "1 of 1 experts were never routed to and have no statistics"
    )


def test_weights_alone_have_no_routing() -> None:
    rows = [expert(0, 0, "up", None, operand="weight")]
    assert findings.routing(PROFILE.frame(rows)).is_empty()


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([1, 2, 3, 7], "1-3, 7"), ([0, 2, 3], "0, 2-3")]
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert findings.ranges(numbers) == text
