"""Sentences on constructed data: each says what the data shows, also when that is not the hope."""

from typing import Any

import polars as pl
import pytest
from scipy import stats

from bitplan.reports import arm_summary, summary, words

BAND = (0.8, 1.25)


def roles(**medians: float) -> pl.DataFrame:
    rows = [{"role": r, "median": m, "high": m, "calm": None} for r, m in medians.items()]
    schema = {"role": pl.String, "median": pl.Float64, "high": pl.Float64, "calm": pl.Float64}
    return pl.DataFrame(rows, schema=schema).sort("median", descending=True)


def test_a_role_that_stands_out_is_named_with_the_others_range() -> None:
    text = words.outliers(roles(qkv=5.0, o=11.0, fc2=200.0), None, "input")
    assert text == (
        "FC2 inputs carry the outliers: median kurtosis 200, against 5.00 to 11.0 for the other "
        "roles."
    )


def test_no_role_is_blamed_where_none_stands_out() -> None:
    text = words.outliers(roles(qkv=5.0, fc2=9.0), None, "input")
    assert text.startswith("No role stands out")
    assert "5.00 to 9.00" in text


def test_the_peak_and_the_few_tokens_behind_it_are_told() -> None:
    frame = roles(qkv=5.0, fc2=100.0).with_columns(calm=pl.Series([8.0, 4.0]))
    text = words.outliers(frame, {"kurtosis": 900.0, "role": "fc2", "block": 3}, "input")
    assert "the peak is 900, at FC2 in block 3" in text
    assert "without the first and the top 1 % of tokens FC2 is at 8.00" in text


def test_a_single_role_and_no_role_at_all() -> None:
    assert "FC1 weights have a median kurtosis of 4.00" in words.outliers(
        roles(fc1=4.0), None, "weight"
    )
    assert words.outliers(roles(), None, "input") == "No kurtosis of inputs was recorded."


def test_errors_name_the_worst_role_and_the_gain() -> None:
    frame = pl.DataFrame(
        {
            "role": ["qkv", "fc2", "qkv", "fc2"],
            "format": ["int4-g128", "int4-g128", "int8-g128", "int8-g128"],
            "median": [18.0, 9.0, 42.0, 33.5],
        }
    )
    assert words.errors(frame, "input") == (
        "At int4-g128, FC2 inputs have the most error, 9.00 dB, 9.0 dB worse than QKV; "
        "int8-g128 gains 24 dB there."
    )


def points(kurtosis: list[float], loss: list[float], operand: str = "input") -> pl.DataFrame:
    n = len(loss)
    return pl.DataFrame(
        {
            "site": [f"s{i}" for i in range(n)],
            "role": ["fc2"] * n,
            "block": list(range(n)),
            "operand": [operand] * n,
            "kurtosis": kurtosis,
            "delta_loss": loss,
        }
    )


def test_the_rank_correlation_is_spearmans() -> None:
    kurtosis, loss = [3.0, 9.0, 4.0, 100.0, 9.0], [0.1, 0.0, 0.3, 0.2, -0.1]
    expected = stats.spearmanr(kurtosis, loss).statistic
    assert words.rank_correlation(points(kurtosis, loss)) == pytest.approx(expected)
    assert words.rank_correlation(points([3.0, 3.0, 3.0], [1.0, 2.0, 3.0])) is None
    assert words.rank_correlation(points([3.0], [1.0])) is None


def test_kurtosis_that_misleads_is_shown_to() -> None:
    text = words.sensitivity(points([900.0, 5.0, 4.0, 6.0], [0.001, 0.002, 0.003, 0.0005]))
    assert "kurtosis is a weak guide" in text
    assert "highest kurtosis (900, FC2 in block 0) ranks 3 of 4 by loss" in text
    assert "the costliest, FC2 in block 2, has a kurtosis of 4.00" in text


def test_kurtosis_that_predicts_is_not_called_misleading() -> None:
    text = words.sensitivity(points([4.0, 5.0, 6.0], [0.1, 0.2, 0.3]))
    assert "Rank correlation 1.00 over 3 inputs: kurtosis orders the inputs well here" in text
    assert "is also the one that costs most" in text


def test_weights_do_not_count_in_the_correlation() -> None:
    assert words.sensitivity(points([4.0, 5.0, 6.0], [1.0, 2.0, 3.0], "weight")).startswith(
        "Too few inputs"
    )


def plan_of(*formats: tuple[str, str, str]) -> pl.DataFrame:
    sites = {
        f"model.layers.{i}.x:{operand}": {"format": f, "role": role, "planned": True}
        for i, (operand, role, f) in enumerate(formats)
    }
    return summary.plan_sites({"sites": sites})


def test_the_forecast_is_told_where_the_plan_has_one() -> None:
    law = {
        "params": 297e6,
        "tokens": 50e9,
        "delta_weights": 0.02134,
        "delta_inputs": 0.0401,
        "R": 1.879,
        "R_fc2_at_8": 1.112,
        "extrapolates": [],
        "next_bit": "inputs",
        "source": "arXiv 2505.14302",
    }
    assert words.advice({}) is None
    assert words.advice({"advice": None}) is None
    assert words.advice({"advice": law}) == (
        "For 297 million parameters and 50 billion training tokens the scaling law (arXiv "
        "2505.14302) forecasts 0.0213 nats from 4-bit weights and 0.0401 from 4-bit inputs, R "
        "1.88, and R 1.11 with FC2 inputs at 8 bits: the next bit should go to the inputs."
    )
    chosen = words.advice({"advice": {**law, "why": "N and D lie within it"}})
    assert chosen is not None
    assert "law (arXiv 2505.14302; N and D lie within it) forecasts" in chosen
    outside = words.advice({"advice": {**law, "extrapolates": ["params 1e12 is outside"]}})
    assert outside is not None
    assert "8 bits; N, D or G lie outside what it was fitted on: the next" in outside


def test_a_plan_is_counted_by_operand_and_role() -> None:
    sites = plan_of(
        ("input", "fc2", "int8-g128"),
        ("input", "fc2", "int8-g128"),
        ("input", "o", "int8-g128"),
        ("input", "qkv", "int4-g128"),
        ("weight", "qkv", "int4-g128"),
    )
    assert words.plan(sites) == (
        "3 of 4 inputs are above int4-g128 (2 FC2 and 1 O); the weight stays at int4-g128."
    )
    assert words.headline(None, sites, {"delta_loss": 0.01}, None) == (
        "The plan raises 3 of 5 sites to 8 bits and is predicted to cost 0.0100 nats per token; "
        "training has not verified it yet."
    )


def test_several_formats_of_the_lowest_bits_are_told_by_their_bits() -> None:
    sites = plan_of(
        ("input", "fc2", "int8-g128"),
        ("input", "o", "int4-g128"),
        ("input", "qkv", "nvfp4"),
        ("weight", "qkv", "mxfp4"),
        ("weight", "o", "int4-g128"),
    )
    assert words.plan(sites) == (
        "1 of 3 inputs are above 4 bits (1 FC2); all 2 weights stay at 4 bits."
    )


def frontier(**rules: float) -> pl.DataFrame:
    rows = [{"label": "optimal", "cost": 5.0, "value": 0.02, "weight_bits": 4.0}]
    rows += [
        {"label": name, "cost": 5.0, "value": value, "weight_bits": 4.0}
        for name, value in rules.items()
    ]
    measure = pl.lit("change of loss (nats per token)")
    return pl.DataFrame(rows).with_columns(measure=measure, input_bits="cost")


CHOSEN = {"cost": 5.0, "value": 0.02}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"fc2": 0.04}, "50 % less than the best rule at no higher cost (fc2) at 0.0400"),
        ({"fc2": 0.02}, "the same as the best rule"),
        ({"fc2": 0.01, "sqnr": 0.03}, "more than the best rule at no higher cost (fc2) at 0.0100"),
        ({}, "no rule is as cheap"),
        ({"plan": 0.001}, "no rule is as cheap"),
    ],
)
def test_the_plan_is_compared_with_rules_honestly(rules: dict[str, float], said: str) -> None:
    assert said in words.frontier(frontier(**rules), CHOSEN, "bits")


def test_a_dearer_rule_is_not_compared_with() -> None:
    table = frontier(fc2=0.001).with_columns(
        cost=pl.when(pl.col("label") == "fc2").then(6.0).otherwise("cost")
    )
    assert "no rule is as cheap" in words.frontier(table, CHOSEN, "bits")


def test_rules_that_spend_more_elsewhere_are_explained() -> None:
    dearer = pl.col("label") == "fc2"
    table = frontier(fc2=0.001).with_columns(weight_bits=pl.when(dearer).then(8.0).otherwise(4.0))
    assert words.frontier(table, CHOSEN, "bits").endswith(
        " The rule below the line (fc2) spends more of what it holds fixed."
    )
    # Between two points of the line a rule may lie below the last one, and spend nothing else.
    assert "below the line" not in words.frontier(frontier(fc2=0.001), CHOSEN, "bits")
    assert "below the line" not in words.frontier(frontier(fc2=0.03), CHOSEN, "bits")


def value(estimate: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"estimate": estimate, "low": low, "high": high}


def test_delta_says_what_the_plan_removes_and_when_that_may_be_chance() -> None:
    before, after = value(0.04, 0.039, 0.041), value(0.01, 0.009, 0.011)
    both = {"w4a4": before, "planned": after}
    assert words.delta(both, 0.001) == (
        "The plan removes 75 % of the error of 4 bits everywhere: from 0.0400 to 0.0100 nats per "
        "token."
    )
    assert words.delta(both, 0.031).endswith("that may be chance (noise floor 0.0310).")
    assert words.delta(both, None).endswith("that may be chance (noise floor unknown).")
    worse = {"w4a4": after, "planned": before}
    assert "does not lower the error" in words.delta(worse, 0.001)
    assert "may be chance" in words.delta(worse, 0.031)
    assert words.delta({"w4a16": before}, None) == (
        "Measured so far, in nats per token: w4a16 0.0400."
    )


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (value(1.0, 0.9, 1.1), "lies inside 0.8 to 1.25"),
        (value(2.0, 1.5, 2.5), "lies above 0.8 to 1.25: the inputs still cost more"),
        (value(0.5, 0.4, 0.6), "lies below 0.8 to 1.25: now the weights cost more"),
        (value(1.2, 1.0, 1.4), "reaches over an edge"),
        (value(1.2, None, None), "1.20 (no bounds): it may be anything"),
        (value(None, None, None), "could not be estimated"),
    ],
)
def test_the_ratio_is_placed_against_the_band(after: dict[str, Any], said: str) -> None:
    assert said in words.ratio({"R": {"after": after}}, BAND)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("converged", "the errors of inputs and weights converge: R goes from"),
        ("activation-limited", "the inputs cost more than the weights"),
        ("weight-limited", "the weights cost more than the inputs"),
        ("undetermined", "These trainings cannot tell"),
    ],
)
def test_the_headline_is_the_verdict(word: str, said: str) -> None:
    ratios = {"before": value(5.3, 4.9, 5.9), "after": value(1.05, 0.93, 1.19)}
    text = words.headline({"verdict": word, "R": ratios}, None, {}, None)
    assert said in text
    assert "from 5.30 (4.90 to 5.90) to 1.05 (0.93 to 1.19)." in text


def test_the_headline_without_bounds_says_why() -> None:
    ratios = {"before": value(0.99, None, None), "after": value(0.67, None, None)}
    assert words.headline({"verdict": "undetermined", "R": ratios}, None, {}, None) == (
        "These trainings cannot tell whether the errors converge: the weights' error cannot be "
        "told from zero, so R has no bounds."
    )


def test_the_headline_before_all_arms_are_trained() -> None:
    verdict = {"verdict": "undetermined", "missing": ["planned", "w4a4"]}
    assert words.headline(verdict, None, {}, None) == (
        "Not decided yet: planned and w4a4 still to be trained."
    )


def test_the_headline_of_a_profile_is_its_finding() -> None:
    assert "FC2 inputs carry the outliers" in words.headline(None, None, {}, roles(o=5.0, fc2=99.0))
    assert words.headline(None, None, {}, roles()) == "Only weights were profiled so far."
    assert words.headline(None, None, {}, None) == "Nothing measured yet."


def test_what_would_settle_it_is_said() -> None:
    asked = {"verdict": "undetermined", "needed": {"seeds": 7, "heldout_tokens": 32768}}
    assert any("--seeds 7 --eval-tokens 32768" in line for line in words.gloss(asked, BAND))
    never = {"verdict": "undetermined", "needed": None}
    assert any("train longer" in line for line in words.gloss(never, BAND))
    done = {"verdict": "converged", "needed": None, "notes": ["a note"], "confidence": 0.95}
    assert words.gloss(done, BAND)[1:] == ["a note"]
    assert "Intervals are 95 %." in words.gloss(done, BAND)[0]
    early = done | {"seeds": 3, "seeds_allowed": 5, "notes": []}
    assert words.gloss(early, BAND)[1:] == ["Settled after 3 of at most 5 seeds."]
    measured = done | {"noise": {"bf16_seeds": 0.0096, "seed_std": 0.0031}}
    assert "Two bf16 seeds differ by 0.0096 nats" in words.gloss(measured, BAND)[1]


def test_training_sentences() -> None:
    curves = pl.DataFrame(
        {
            "arm": ["w4a4", "w4a4", "planned"],
            "tokens": [1, 2, 2],
            "mean": [0.9, 0.0362, -0.0001],
            "seeds": [3, 3, 2],
        }
    )
    assert "w4a4 +0.0362 and planned -0.0001 (mean of 2 seeds" in words.deltas_in_training(curves)
    kurtosis = pl.DataFrame(
        {
            "arm": ["w4a4"] * 4,
            "step": [0, 8, 0, 8],
            "role": ["fc2", "fc2", "o", "o"],
            "kurtosis": [190.0, 89.0, 10.0, 5.0],
        }
    )
    assert words.stats(kurtosis).endswith("first to last step: FC2 190 to 89 and O 10 to 5.0.")
    assert words.copies({"planned-weights": "w4a16"}) == (
        " planned-weights quantizes exactly as w4a16: one training, drawn once."
    )
    assert words.copies({}) == ""


def test_the_predicted_ratio_stands_beside_the_measured_one() -> None:
    assert words.predicted_ratio({}) == ""
    assert words.predicted_ratio({"R": None, "R_trained": None}) == ""
    untrained = " The plan predicted 1.13 for the untrained checkpoint"
    assert words.predicted_ratio({"R": 1.131}) == untrained + "."
    both = words.predicted_ratio({"R": 1.131, "R_trained": 0.98})
    assert both == untrained + ", 0.98 after training."


def test_attribution_names_the_largest_and_the_usual_suspect() -> None:
    def entry(estimate: float) -> dict[str, float]:
        return {"estimate": estimate, "low": estimate - 0.001, "high": estimate + 0.001}

    found = {
        "fc2": {"input": entry(0.02), "weight": entry(0.004), "R": None},
        "qkv": {"input": entry(0.03), "weight": None, "R": None},
    }
    frame = arm_summary.attribution({"attribution": found})
    assert frame["label"].to_list() == ["qkv inputs", "fc2 inputs", "fc2 weights"]
    said = words.attribution(frame)
    assert said.startswith("8 bits at the inputs of QKV alone give back the most")
    assert "0.0300 (0.0290 to 0.0310)" in said
    assert "the inputs of FC2 come as number 2, 0.0200 (0.0190 to 0.0210)" in said
    del found["qkv"]
    alone = words.attribution(arm_summary.attribution({"attribution": found}))
    assert "number" not in alone
    assert arm_summary.attribution({}).is_empty()
