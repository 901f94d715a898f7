"""The page of real training is that of the committed results, and its answers follow from them."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bitplan.rundir import RunDir

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WEIGHT, INPUT = "layers.0.mlp.down_proj:weight", "layers.0.mlp.down_proj:input"


def load(name: str) -> Any:
    """Return a script of benchmarks, which may import another one by name."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(BENCHMARKS)
        module = importlib.import_module(name)
        for one in (name, "training"):
            sys.modules.pop(one, None)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return load("real_training")


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


def trained(run: RunDir, arm: str, seed: int, formats: dict[str, str], losses: list[float]) -> None:
    """Write what a finished training leaves."""
    place = f"arms/{arm}/seed-{seed}"
    (run.path / place).mkdir(parents=True)
    recipe = {"steps": 2, "batch_size": 1, "seq_len": 4, "lr": 1e-4}
    record = {"arm": arm, "seed": seed, "hardware": "1 x CPU", "seconds": 1.0}
    run.write_json(
        f"{place}/record.json", {**record, "config": {"recipe": recipe, "formats": formats}}
    )
    sequences = {"sequence": range(len(losses)), "loss": losses}
    pl.DataFrame(sequences).write_parquet(run.path / place / "heldout.parquet")
    stats = {"operand": "input", "role": "fc2", "step": [1, 2], "kurtosis": [3.0, 5.0 + seed]}
    pl.DataFrame(stats).write_parquet(run.path / place / "stats.parquet")


def test_arms_of_a_cut_off_comparison_are_compared_by_the_seeds_they_share(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    rng = np.random.default_rng(0)
    bf16 = [list(2 + rng.random(8)) for _ in range(3)]
    for seed in range(3):
        trained(run, "bf16", seed, {}, bf16[seed])
    weights, inputs = {WEIGHT: "int4-g8"}, {INPUT: "int4-g8"}
    for seed in range(2):
        worse = [loss + 0.1 + 0.02 * seed for loss in bf16[seed]]
        trained(run, "w4a16", seed, weights, worse)
        trained(run, "w4a4", seed, weights | inputs, [loss + 0.3 for loss in worse])
    spared = weights | {INPUT: "int8-g8"}
    trained(run, "w4a4-fc2-input-8", 1, spared, [loss + 0.15 for loss in bf16[1]])
    # Of one plan, whose weights are those of w4a16; of two plans.
    for seed in range(2):
        trained(run, "planned", seed, spared, [loss + 0.2 for loss in bf16[seed]])
        other = inputs if seed else {INPUT: "int8-g8"}
        trained(run, "planned-inputs", seed, other, [loss + 0.05 for loss in bf16[seed]])
    found = load("arms_compared").compare(run)
    delta = found["delta_nats"]
    assert delta["w4a16"]["estimate"] == pytest.approx(0.11)
    assert delta["w4a16"]["seeds"] == 2
    assert delta["planned-weights"] == delta["w4a16"]
    assert "planned-inputs" not in delta
    back = found["given_back_nats"]["w4a4-fc2-input-8"]
    assert back["estimate"] == pytest.approx(0.12 + 0.3 - 0.15)
    assert back["seeds"] == 1
    assert back["low"] <= back["estimate"] <= back["high"]
    assert found["R"] == {}
    assert found["input_kurtosis"]["bf16"] == {"first": {"fc2": 3.0}, "last": {"fc2": 6.0}}
