import json
import math
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.errors import RunError
from bitplan.probe.compare import compare
from bitplan.probe.snapshot import Snapshot
from bitplan.tables import ERRORS, OUTLIERS, PROFILE

LEAVES = {"q_proj": "qkv", "k_proj": "qkv", "down_proj": "fc2"}


def rows(**changes: Any) -> list[dict[str, Any]]:
    """The rows of two blocks, each input with a channel and a token that stick out."""
    return [
        {
            "site": f"layers.{block}.{leaf}:{operand}",
            "module": f"layers.{block}.{leaf}",
            "operand": operand,
            "role": role,
            "block": block,
            "fused": f"layers.{block}:qkv" if role == "qkv" else None,
            "step": 0,
            "in_features": 16,
            "out_features": 8,
            "mean": 0.0,
            "std": 2.0,
            "kurtosis": 5.0,
            "absmax": 9.0,
            "top_channels": [
                {"channel": 3, "absmax": 60.0, "rms": 8.0},
                {"channel": 4, "absmax": 3.0, "rms": 2.0},
            ],
            "top_tokens": [{"sequence": 0, "position": 1, "absmax": 60.0, "text": "a\n"}],
        }
        | changes
        for block in range(2)
        for leaf, role in LEAVES.items()
        for operand in ("weight", "input")
    ]


def snapshot(
    found: list[dict[str, Any]],
    *,
    errors: dict[str, float] | None = None,
    outliers: list[dict[str, Any]] | None = None,
    text: str | None = "text",
    name: str = "run",
) -> Snapshot:
    return Snapshot(
        name=name,
        profile=PROFILE.frame(found),
        errors=None
        if errors is None
        else ERRORS.frame(
            {"site": row["site"], "step": 0, "format": name, "relative_error": error}
            for row in found
            for name, error in errors.items()
        ),
        outliers=None if outliers is None else OUTLIERS.frame(outliers),
        text=text,
    )


def changed(site: str, **changes: Any) -> list[dict[str, Any]]:
    return [row | changes if row["site"] == site else row for row in rows()]


def test_the_same_statistics_differ_in_nothing() -> None:
    both = [snapshot(rows(), errors={"int4-g128": 0.01}, outliers=[]) for _ in range(2)]
    found = compare(*both)
    assert (found.sites, found.unchanged, found.only) == (12, 12, (0, 0))
    for name in ("changes", "channels", "tokens", "findings", "drift"):
        assert getattr(found, name).is_empty()
    assert "no statistic differs\nunchanged: 12 of 12 sites" in found.as_text()


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(0.5, 1e5), st.floats(0.5, 1e5)), min_size=12, max_size=12),
    statistic=st.sampled_from(["kurtosis", "absmax"]),
)
def test_the_site_that_changed_most_is_that_of_a_loop(
    values: list[tuple[float, float]], statistic: str
) -> None:
    before, after = (
        [row | {statistic: pair[side]} for row, pair in zip(rows(), values, strict=True)]
        for side in (0, 1)
    )
    found = compare(snapshot(before), snapshot(after)).changes
    groups: dict[tuple[str, str], list[tuple[float, str, float, float]]] = {}
    for a, b in zip(before, after, strict=True):
        ratio = abs(math.log(b[statistic] / a[statistic]))
        group = groups.setdefault((a["role"], a["operand"]), [])
        group.append((ratio, a["site"], a[statistic], b[statistic]))
    for row in found.iter_rows(named=True):
        assert row["statistic"] == statistic
        group = groups.pop((row["role"], row["operand"]))
        assert row["sites"] == len(group)
        most = max(ratio for ratio, *_ in group)
        assert abs(math.log(row["after"] / row["before"])) == pytest.approx(most)
        assert (row["site"], row["before"], row["after"]) in {entry[1:] for entry in group}
    assert all(ratio == 0 for group in groups.values() for ratio, *_ in group)


def test_errors_are_those_of_the_lowest_format_of_both() -> None:
    before = snapshot(rows(), errors={"int3-g128": 0.2, "int4-g128": 0.01, "int8-g128": 1e-4})
    after = snapshot(rows(), errors={"int4-g128": 0.02, "int8-g128": 1e-4})
    found = compare(before, after)
    assert found.number_format == "int4-g128"
    assert found.changes["statistic"].unique().to_list() == ["error"]
    assert set(found.changes["after"]) == {0.02}
    lines = [line.split() for line in found.as_text().splitlines()]
    line = next(line for line in lines if line[:2] == ["fc2", "input"])
    assert line[2:9] == ["int4-g128", "error", "1.00%", "2.00%", "1.00%", "2.00%", "x2"]


def test_what_is_null_on_one_side_is_a_difference_without_a_ratio() -> None:
    found = compare(snapshot(rows()), snapshot(changed("layers.0.q_proj:input", kurtosis=None)))
    assert found.unchanged == 11
    assert found.changes.is_empty()


def test_channels_that_come_and_go() -> None:
    top = [{"channel": 9, "absmax": 50.0, "rms": 7.0}, {"channel": 4, "absmax": 3.0, "rms": 5.9}]
    found = compare(
        snapshot(rows()), snapshot(changed("layers.1.down_proj:input", top_channels=top))
    )
    # Channel 4 sticks out on neither side: 5.9 is below 3 times the rms of 2.
    assert found.channels.select("change", "site", "channel", "over_rms").rows() == [
        ("new", "layers.1.down_proj:input", 9, 3.5),
        ("vanished", "layers.1.down_proj:input", 3, 4.0),
    ]
    text = found.as_text()
    assert "outlier channels (rms above 3 times the tensor's): 1 new, 1 vanished" in text
    assert "  new: layers.1.down_proj:input channel 9, 3.5 times the rms" in text


def test_an_input_that_linears_share_is_told_once() -> None:
    found = compare(snapshot(rows()), snapshot(rows(top_channels=[])))
    assert found.channels["site"].to_list() == [
        "layers.0.down_proj:input",
        "layers.0.q_proj:input",
        "layers.1.down_proj:input",
        "layers.1.q_proj:input",
    ]


def test_tokens_are_compared_on_the_same_text_only() -> None:
    top = [
        {"sequence": 2, "position": 0, "absmax": 80.0, "text": "<s>"},
        {"sequence": 2, "position": 5, "absmax": 39.0, "text": "x"},
    ]
    after = changed("layers.1.down_proj:input", top_tokens=top)
    found = compare(snapshot(rows()), snapshot(after))
    assert found.tokens is not None
    assert found.tokens.select("change", "token", "over_rms").rows() == [
        ("new", "'<s>' at 0 of sequence 2", 40.0),
        ("vanished", r"'a\n' at 1 of sequence 0", 30.0),
    ]
    for text in ("another", None):
        other = compare(snapshot(rows()), snapshot(after, text=text))
        assert other.tokens is None
        assert "not compared, the text is not the same" in other.as_text()
        assert "the inputs are of different text" in other.as_text()
    assert compare(snapshot(rows(), text=None), snapshot(after, text=None)).tokens is None


def finding(kind: str, channel: int, column: int | None, value: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "module": "layers.1",
        "channel": channel,
        "input_channel": column,
        "value": value,
    }


def test_massive_activations_and_super_weights_come_and_go() -> None:
    before = [finding("massive_activation", 5, None, 900.0), finding("super_weight", 5, 7, 640.0)]
    after = [
        finding("massive_activation", 5, None, 950.0),
        finding("super_weight", 5, 8, 640.0),
        finding("massive_activation", 6, None, -2000.0),
    ]
    found = compare(snapshot(rows(), outliers=before), snapshot(rows(), outliers=after))
    assert found.findings is not None
    assert found.findings.select("change", "place", "value").rows() == [
        ("new", "channel 6", -2000.0),
        ("new", "weight [5, 8]", 640.0),
        ("vanished", "weight [5, 7]", 640.0),
    ]
    assert "massive activations and super weights: 2 new, 1 vanished" in found.as_text()
    unknown = compare(snapshot(rows()), snapshot(rows(), outliers=after))
    assert unknown.findings is None
    assert "not looked for on both sides" in unknown.as_text()


def test_drift_is_that_of_the_later_side() -> None:
    drifted = [
        row | {"drift": 1e-3 * (row["block"] + 1)} if row["operand"] == "weight" else row
        for row in rows()
    ]
    found = compare(snapshot(rows()), snapshot(drifted)).drift
    assert found.rows() == [
        ("qkv", 1.5e-3, 2e-3, "layers.1.k_proj:weight"),
        ("fc2", 1.5e-3, 2e-3, "layers.1.down_proj:weight"),
    ]
    assert compare(snapshot(drifted), snapshot(rows())).drift.is_empty()


def test_sites_of_one_side_are_counted_and_left_out() -> None:
    weights = [row for row in rows(kurtosis=6.0) if row["operand"] == "weight"]
    found = compare(snapshot(rows()), snapshot(weights))
    assert (found.sites, found.only) == (6, (6, 0))
    assert set(found.changes["operand"]) == {"weight"}
    assert "only in A: 6 sites, not compared" in found.as_text()


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (rows(in_features=32), r"is \[8, 16\] in the first, \[8, 32\] in the second"),
        (rows()[:-2], r"layers.1.down_proj is \[8, 16\] in the first, absent in the second"),
    ],
)
def test_another_model_is_refused(after: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(RunError, match=f"different models .*{says}"):
        compare(snapshot(rows()), snapshot(after))


def test_the_comparison_is_json() -> None:
    found = compare(snapshot(rows()), snapshot(rows(kurtosis=6.0), text=None))
    back = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert back["sites"] == 12
    assert len(back["changes"]) == found.changes.height == 4
    assert back["tokens"] is None


def test_more_than_is_listed_is_counted() -> None:
    top = [{"channel": c, "absmax": 50.0, "rms": 7.0} for c in range(5, 12)]
    found = compare(
        snapshot(rows()), snapshot(changed("layers.1.down_proj:input", top_channels=top))
    )
    assert found.channels.filter(pl.col("change") == "new").height == 7
    assert "  new: and 2 more" in found.as_text()
