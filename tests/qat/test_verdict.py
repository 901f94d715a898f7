"""The verdict's arithmetic against Monte Carlo, scipy and cases worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bitplan.qat.verdict import (
    Interval,
    Looks,
    decide,
    delta,
    differences,
    fieller,
    look_level,
    needed,
    noise,
    ratio,
    spread,
)


def simulated(
    rng: np.random.Generator,
    means: tuple[float, float],
    *,
    seeds: int = 3,
    sequences: int = 64,
    seed_std: float = 0.001,
    text_std: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Paired differences of two arms: mean + effect of the seed + effect of the sequence.

    Both effects are correlated between the arms, as they are in training.
    """
    covariance = np.array([[1.0, 0.6], [0.6, 1.0]])
    by_seed = rng.multivariate_normal([0, 0], covariance * seed_std**2, seeds)
    by_text = rng.multivariate_normal([0, 0], covariance * text_std**2, sequences)
    values = np.array(means)[:, None, None] + by_seed.T[:, :, None] + by_text.T[:, None, :]
    return values[0], values[1]


def test_delta_is_students_interval_where_only_the_seeds_differ() -> None:
    by_seed = np.array([0.010, 0.013, 0.011, 0.018])
    found = delta(np.repeat(by_seed[:, None], 50, axis=1))
    low, high = stats.t.interval(0.95, 3, loc=by_seed.mean(), scale=stats.sem(by_seed))
    assert found.estimate == pytest.approx(by_seed.mean())
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(("sequences", "together"), [(20, 1), (32, 1), (96, 3)])
def test_delta_is_students_interval_over_batches_of_text_for_one_seed(
    sequences: int, together: int
) -> None:
    values = np.random.default_rng(0).normal(0.02, 0.01, (1, sequences))
    found = delta(values, Looks(0.9))
    batches = values.reshape(-1, together).mean(1)
    low, high = stats.t.interval(0.9, len(batches) - 1, loc=values.mean(), scale=stats.sem(batches))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_neighbors_that_say_the_same_count_once() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.01, (1, 32))
    once, repeated = delta(values), delta(values.repeat(3, axis=1))
    assert (once.low, once.high) == pytest.approx((repeated.low, repeated.high))


def test_half_widths_of_seeds_and_text_add_in_quadrature() -> None:
    rng = np.random.default_rng(1)
    by_seed, by_text = rng.normal(0, 1, 5), rng.normal(0, 1, 30)
    found = delta(by_seed[:, None] + by_text[None, :])
    assert found.high is not None
    assert found.estimate is not None
    seed_half = stats.t.ppf(0.975, 4) * stats.sem(by_seed)
    text_half = stats.t.ppf(0.975, 29) * stats.sem(by_text)
    assert found.high - found.estimate == pytest.approx(math.hypot(seed_half, text_half))


def test_delta_of_the_baseline_is_zero_and_one_sequence_has_no_bounds() -> None:
    losses = {"bf16": np.ones((3, 4)), "w4a16": np.ones((3, 4)) * 1.5}
    paired = differences(losses, "bf16")
    assert delta(paired["bf16"]) == Interval(0.0, 0.0, 0.0)
    assert delta(np.array([[0.1]])) == Interval(0.1, None, None)


def test_delta_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        found = delta(simulated(rng, (0.02, 0.03))[0])
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.02 <= found.high
    # Quadrature of a t interval and a nearly normal one is a little wide, never narrow.
    assert 0.94 <= hits / 1000 <= 0.995


def brute_force_fieller(x: float, y: float, half: np.ndarray) -> tuple[float, float]:
    """Scan r for the set (y - r x)^2 <= H_yy - 2 r H_xy + r^2 H_xx."""
    grid = np.linspace(-20, 20, 2_000_001)
    inside = (y - grid * x) ** 2 <= half[1, 1] - 2 * grid * half[0, 1] + grid**2 * half[0, 0]
    return float(grid[inside].min()), float(grid[inside].max())


@pytest.mark.parametrize("correlation", [-0.9, 0.0, 0.5, 0.99])
@pytest.mark.parametrize("y", [0.0, 0.7, 2.0])
def test_fieller_equals_a_scan_of_its_definition(y: float, correlation: float) -> None:
    half = np.array([[0.04, correlation * 0.06], [correlation * 0.06, 0.09]])
    found = fieller(1.0, y, half)
    assert (found.low, found.high) == pytest.approx(brute_force_fieller(1.0, y, half), abs=3e-5)
    assert found.estimate == pytest.approx(y)


@given(
    st.floats(0.3, 3),
    st.floats(-3, 3),
    st.floats(0, 0.25),
    st.floats(0, 2),
    st.floats(-0.999, 0.999),
)
@settings(max_examples=200, deadline=None)
def test_fieller_contains_its_estimate(
    x: float, y: float, x_half: float, y_half: float, correlation: float
) -> None:
    off = correlation * x_half * y_half
    found = fieller(x, y, np.array([[x_half**2, off], [off, y_half**2]]))
    assert found.low is not None
    assert found.high is not None
    assert found.low - 1e-9 <= y / x <= found.high + 1e-9


@pytest.mark.parametrize("x", [0.1, 0.0, -0.1, -5.0])
def test_a_denominator_that_is_not_clearly_positive_gives_no_bounds(x: float) -> None:
    found = fieller(x, 1.0, np.array([[0.04, 0.0], [0.0, 0.01]]))
    assert (found.low, found.high) == (None, None)
    assert (found.estimate is None) == (x == 0)


def test_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(1000):
        weights, inputs = simulated(rng, (0.010, 0.018), seeds=4, seed_std=0.001)
        found = ratio(inputs, weights)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.8 <= found.high
    assert 0.94 <= hits / 1000 <= 0.995


def test_ratio_agrees_with_a_bootstrap_over_many_seeds() -> None:
    rng = np.random.default_rng(4)
    weights, inputs = simulated(rng, (0.010, 0.018), seeds=200, seed_std=0.003, text_std=1e-6)
    found = ratio(inputs, weights)
    rows = rng.integers(0, 200, (5000, 200))
    ratios = inputs.mean(1)[rows].mean(1) / weights.mean(1)[rows].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))


def test_pairing_removes_what_the_arms_share() -> None:
    rng = np.random.default_rng(5)
    shared = rng.normal(3, 1, (3, 50))
    losses = {"bf16": shared, "w4a16": shared + 0.01, "w16a4": shared + 0.02}
    paired = differences(losses, "bf16")
    found = ratio(paired["w16a4"], paired["w4a16"])
    assert found.low == pytest.approx(2)
    assert found.high == pytest.approx(2)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.8, 1.25, "converged"),
        (0.95, 1.05, "converged"),
        (1.26, 1.5, "activation-limited"),
        (1.25, 1.5, "undetermined"),
        (1.05, 1.3, "undetermined"),
        (0.1, 0.79, "weight-limited"),
        (-0.2, 0.1, "weight-limited"),
        (0.7, 0.8, "undetermined"),
        (0.5, 2.0, "undetermined"),
        (None, None, "undetermined"),
    ],
)
def test_the_interval_decides(low: float | None, high: float | None, word: str) -> None:
    assert decide(Interval(1.0, low, high)) == word


@given(st.floats(0.01, 5), st.floats(0, 5))
def test_words_exclude_each_other_and_cover_everything(low: float, width: float) -> None:
    high = low + width
    holds = {
        "converged": low >= 0.8 and high <= 1.25,
        "activation-limited": low > 1.25,
        "weight-limited": high < 0.8,
    }
    assert sum(holds.values()) <= 1
    expected = next((word for word, true in holds.items() if true), "undetermined")
    assert decide(Interval(low, low, high)) == expected


def test_needed_names_the_fewest_seeds_that_settle() -> None:
    weights, inputs = simulated(
        np.random.default_rng(6), (0.010, 0.014), seed_std=0.001, text_std=1e-5
    )
    assert decide(ratio(inputs, weights)) == "undetermined"
    found = needed(inputs, weights)
    assert found is not None
    assert found.text == 1
    known = spread([weights, inputs])

    def word(seeds: int) -> str:
        half = known.squared_half_widths(Looks(), seeds=seeds)
        return decide(fieller(float(weights.mean()), float(inputs.mean()), half))

    assert word(found.seeds) != "undetermined"
    assert all(word(n) == "undetermined" for n in range(3, found.seeds))


def test_needed_asks_for_text_where_seeds_do_not_help() -> None:
    weights, inputs = simulated(
        np.random.default_rng(7), (0.010, 0.010), seed_std=1e-7, text_std=0.02
    )
    found = needed(inputs, weights)
    assert found is not None
    assert found.text > 1
    assert needed(inputs, weights, most_text=found.text - 1) is None
    one = needed(inputs[:1], weights[:1])
    assert one is not None
    assert one.seeds == 1


def test_needed_is_none_where_the_estimate_lies_on_a_bound() -> None:
    weights = np.array([[0.009], [0.011]]) * np.ones((2, 8))
    inputs = 1.25 * np.array([[0.011], [0.009]]) * np.ones((2, 8))
    assert needed(inputs, weights) is None


def test_noise_is_the_spread_of_the_deltas() -> None:
    by_seed = np.array([0.010, 0.013, 0.011])
    baseline = np.array([2.0, 2.1, 2.3])[:, None] * np.ones(20)
    losses = {"bf16": baseline, "w4a16": baseline + by_seed[:, None]}
    found = noise(losses, "bf16")
    # Two of the three seeds at random: 0.1, 0.2 or 0.3 apart.
    assert found["bf16_seeds"] == pytest.approx(math.sqrt((0.1**2 + 0.2**2 + 0.3**2) / 3))
    assert found["seed_std"] == pytest.approx(by_seed.std(ddof=1))
    assert found["evaluation_stderr"] == pytest.approx(0, abs=1e-12)
    assert found["floor"] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(by_seed))
    nothing = {"bf16_seeds": None, "seed_std": None, "evaluation_stderr": None, "floor": None}
    assert noise({"bf16": baseline}, "bf16") == nothing | {"bf16_seeds": found["bf16_seeds"]}
    assert noise({"w4a16": baseline}, "bf16") == nothing


def test_looks_at_one_number_of_seeds_are_one_look() -> None:
    assert look_level(3, 3, 0.05) == 0.05
    values = simulated(np.random.default_rng(8), (0.01, 0.02))
    assert ratio(*values, Looks(most=3)) == ratio(*values)
    assert list(Looks(most=2).seeds()) == [2]
    assert list(Looks(most=5).seeds()) == [3, 4, 5]


@pytest.mark.parametrize(("first", "most", "miss"), [(3, 5, 0.05), (2, 6, 0.1), (3, 20, 0.01)])
def test_the_level_of_looks_misses_as_often_as_asked_in_all(
    first: int, most: int, miss: float
) -> None:
    level = look_level(first, most, miss)
    assert miss / (most - first + 1) < level < miss
    rng = np.random.default_rng(9)
    values = rng.standard_normal((40_000, most))
    left = np.zeros(len(values), bool)
    for n in range(first, most + 1):
        left |= stats.ttest_1samp(values[:, :n], 0, axis=1).pvalue < level
    assert left.mean() == pytest.approx(miss, rel=0.1)


def test_stopping_at_the_first_word_errs_no_more_often_than_asked() -> None:
    """On the bound, where any word is chance, and looking each time at the plain level is not."""
    rng = np.random.default_rng(10)
    most, trials = 8, 400
    wrong = {"bounded": 0, "peeking": 0}
    for _ in range(trials):
        weights, inputs = simulated(rng, (0.02, 0.025), seeds=most, text_std=1e-4)
        for name, looks in (("bounded", Looks(most=most)), ("peeking", Looks())):
            found = (ratio(inputs[:n], weights[:n], looks) for n in range(3, most + 1))
            wrong[name] += any(decide(interval) != "undetermined" for interval in found)
    assert wrong["bounded"] / trials < 0.08  # 0.05 and three standard errors
    assert wrong["peeking"] / trials > 0.1


def test_needed_settles_in_most_cases_when_it_is_followed() -> None:
    rng = np.random.default_rng(11)
    settled = []
    for _ in range(60):
        weights, inputs = simulated(rng, (0.02, 0.024), seeds=40, seed_std=0.0015, text_std=1e-4)
        few = (inputs[:3], weights[:3])
        if decide(ratio(*few)) != "undetermined":
            continue
        found = needed(*few)
        if found is not None and found.seeds <= 40:
            all_ = (inputs[: found.seeds], weights[: found.seeds])
            settled.append(decide(ratio(*all_)) != "undetermined")
    assert len(settled) > 20
    assert np.mean(settled) > 0.5


def test_needed_weighs_what_training_costs() -> None:
    """Seeds and text both help: of what settles, the cheapest, found by trying everything."""
    weights, inputs = simulated(
        np.random.default_rng(12), (0.010, 0.0135), seeds=4, seed_std=0.0008, text_std=0.008
    )
    known = spread([weights, inputs])
    asked = {}
    for training in (0.1, 300.0):
        best = (math.inf, 0, 0)
        for text in (2**power for power in range(11)):
            for seeds in range(4, 101):
                half = known.squared_half_widths(Looks(), seeds=seeds, text=text)
                new = seeds - 4 if text == 1 else seeds
                if decide(fieller(weights.mean(), inputs.mean(), half)) != "undetermined":
                    best = min(best, (new * (training + text), seeds, text))
        found = asked[training] = needed(inputs, weights, training=training)
        assert found is not None
        assert (found.seeds, found.text) == best[1:]
    assert asked[0.1].seeds > asked[300.0].seeds
    assert asked[0.1].text < asked[300.0].text


def test_needed_counts_the_looks_to_come() -> None:
    weights, inputs = simulated(
        np.random.default_rng(6), (0.010, 0.014), seed_std=0.001, text_std=1e-5
    )
    once, looked = needed(inputs, weights), needed(inputs, weights, Looks(most=3))
    assert once is not None
    assert looked is not None
    assert looked.seeds > once.seeds
