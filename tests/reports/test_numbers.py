import pytest

from bitplan.reports.numbers import bounds, count, estimate, interval, number, percent, span


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (187.3, "187"),
        (9999.0, "9,999"),
        (12345.0, "12.3k"),
        (1.5e7, "1.50e+07"),
        (0.0191, "0.0191"),
        (-0.5, "-0.500"),
        (1.2e-5, "1.20e-05"),
        (None, "n/a"),
    ],
)
def test_number(value: float | None, spelled: str) -> None:
    assert number(value) == spelled


def test_intervals_have_the_digits_asked_for() -> None:
    fine = {"estimate": 0.03617, "low": 0.03537, "high": 0.03697}
    assert interval(fine, 4) == "0.0362 (0.0354 to 0.0370)"
    assert (estimate(fine, 2), bounds(fine, 3)) == ("0.04", "0.035 to 0.037")


def test_an_interval_without_bounds_says_so() -> None:
    value = {"estimate": 3.21, "low": None, "high": None}
    assert interval(value, 2) == "3.21 (no bounds)"
    assert interval({"estimate": None, "low": None, "high": None}, 2) == "unknown"


def test_counts_shares_and_spans() -> None:
    assert count(3_145_984) == "3.15 million"
    assert count(1.5e9) == "1.5 billion"
    assert count(512) == "512"
    assert percent(0.4312) == "43 %"
    assert span([4.1, 17.2, 5.0]) == "4.10 to 17.2"
    assert span([4.1]) == "4.10"
