import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.errors import BitplanError, FormatError
from bitplan.formats import BF16, parse_format, parse_formats, short_groups_note

SPELLINGS = st.one_of(
    st.sampled_from(["bf16", "fp8-e4m3", "nvfp4", "mxfp4"]),
    st.builds(
        "int{}-{}".format,
        st.integers(2, 8),
        st.one_of(
            st.sampled_from(["token", "channel", "tensor"]),
            st.integers(1, 4096).map("g{}".format),
        ),
    ),
)


@given(SPELLINGS)
def test_parse_and_print_are_inverse(text: str) -> None:
    assert str(parse_format(text)) == text
    assert parse_format(f"  {text.upper()} ") == parse_format(text)


@given(SPELLINGS, st.integers(1, 5000))
def test_effective_bits_count_every_scale_of_a_row(text: str, in_features: int) -> None:
    fmt = parse_format(text)
    if fmt.granularity == "group":
        assert fmt.group_size is not None
        starts = range(0, in_features, fmt.group_size)
        total = sum(
            min(fmt.group_size, in_features - s) * fmt.bits + fmt.scale_bits for s in starts
        )
    elif fmt.granularity in ("tensor", "none"):
        total = in_features * fmt.bits
    else:
        total = in_features * fmt.bits + fmt.scale_bits
    assert math.isclose(fmt.effective_bits(in_features), total / in_features)


def test_the_designs_example() -> None:
    assert parse_format("int4-g128").effective_bits(1024) == 4.125
    assert BF16.effective_bits(1024) == 16


@pytest.mark.parametrize("text", ["", "int9-g128", "int4", "int4-g0", "int4-row", "fp4", "int1-g2"])
def test_other_spellings_are_refused_with_the_spellings_there_are(text: str) -> None:
    with pytest.raises(FormatError, match="format"):
        parse_format(text)
    assert issubclass(FormatError, BitplanError)
    assert issubclass(BitplanError, ValueError)


def test_operands_have_the_axis_their_scales_need() -> None:
    assert not parse_format("int8-token").applies_to("weight")
    assert not parse_format("int8-channel").applies_to("input")
    for text in ("int4-g128", "fp8-e4m3", "bf16", "int8-tensor"):
        assert parse_format(text).applies_to("weight")
        assert parse_format(text).applies_to("input")


def test_lists_keep_their_order_and_drop_repeats() -> None:
    assert [str(f) for f in parse_formats(["int8-g128", " int4-g128", "int8-g128"])] == [
        "int8-g128",
        "int4-g128",
    ]
    with pytest.raises(FormatError):
        parse_formats([])


def test_a_star_stands_for_every_group_size() -> None:
    spelled = "int4-g32 int4-g64 int4-g128 int4-g256 int4-token int4-channel"
    assert [str(f) for f in parse_formats(["int4-g*"])] == spelled.split()
    mixed = [str(f) for f in parse_formats(["int4-g64", " int4-g* ", "int8-g128"])]
    assert mixed[0] == "int4-g64"
    assert len(mixed) == 7
    for wrong in ("int4-g*8", "int9-g*", "nvfp4-g*", "-g*"):
        with pytest.raises(FormatError, match="unknown format"):
            parse_formats([wrong])


@given(SPELLINGS, st.integers(1, 5000))
def test_the_short_group_is_what_whole_groups_leave(text: str, in_features: int) -> None:
    fmt = parse_format(text)
    rest = in_features
    while fmt.group_size is not None and rest >= fmt.group_size:
        rest -= fmt.group_size
    assert fmt.short_group(in_features) == (0 if fmt.group_size is None else rest)


def test_short_groups_are_told_in_one_note() -> None:
    g128, g32, token = map(parse_format, ("int4-g128", "int4-g32", "int4-token"))
    assert short_groups_note([(g128, 1024), (g32, 96), (token, 100), (BF16, 100)]) == []
    (note,) = short_groups_note([(g128, 576), (g128, 576), (g32, 576), (g128, 1600), (token, 9)])
    assert note.startswith("rows of 3 sites end in a shorter group")
    assert "(groups of 128 in rows of 576, groups of 128 in rows of 1,600)" in note
