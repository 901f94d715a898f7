"""The page of real training is that of the committed results, and its answers follow from them."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    path = ROOT / "benchmarks" / "real_training.py"
    spec = importlib.util.spec_from_file_location("real_training", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_results(script: Any) -> None:
    text = "\n".join(script.page(*script.read(script.RESULTS))).rstrip("\n") + "\n"
    assert script.PAGE.read_text() == text, "run python benchmarks/real_training.py"
    assert not re.search(r"\b(nan|inf|None)\b", text)
    # Every row of a table has the columns of its head.
    for rows in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in rows.splitlines()}) == 1


def value(low: float, high: float) -> dict[str, Any]:
    return {"estimate": (low + high) / 2, "low": low, "high": high, "seeds": 3}


@pytest.mark.parametrize(
    ("qkv", "fc2", "answer"),
    [
        ((0.1, 0.2), (0.3, 0.4), True),  # apart: FC2 gives back most
        ((0.3, 0.4), (0.1, 0.2), False),
        ((0.1, 0.3), (0.2, 0.4), None),  # the intervals meet
        ((0.2, 0.4), (0.1, 0.3), None),
    ],
)
def test_the_bottleneck_is_where_the_intervals_say_so(
    script: Any, qkv: tuple[float, float], fc2: tuple[float, float], answer: bool | None
) -> None:
    given = {"w4a4-qkv-input-8": value(*qkv), "w4a4-fc2-input-8": value(*fc2)}
    assert script.bottleneck({"given_back_nats": given}) is answer


def test_answers_that_differ_are_all_told(script: Any) -> None:
    assert script.answer([True, True]) == "**yes**"
    assert script.answer([False]) == "**no**"
    assert script.answer([True, None, False]) == "yes, undetermined, no"
    assert script.within(value(0.9, 1.2)) is True
    assert script.within(value(1.2, 1.4)) is None
    assert script.within(value(1.3, 1.4)) is False
    assert script.above({"estimate": -1.9, "low": None, "high": None}, 1) is None
