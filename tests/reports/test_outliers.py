"""The section on where the outliers are: its frames by naive loops, its sentences, its charts."""

import json
import re
from typing import Any

import polars as pl
import pytest

from bitplan import findings
from bitplan.reports import outlier_charts, outlier_summary, outlier_words
from bitplan.reports.charts import to_spec
from bitplan.reports.load import load_run
from bitplan.reports.outlier_sections import where
from bitplan.reports.report import write_report
from bitplan.tables import ERRORS, OUTLIERS, PROFILE

from .conftest import MakeRun, Synthetic
from .test_markup import Reader
from .test_report import HOSTILE, charts_of


@pytest.fixture(scope="module")
def made() -> Synthetic:
    return Synthetic()


@pytest.fixture(scope="module")
def inputs(made: Synthetic) -> pl.DataFrame:
    return outlier_summary.distinct_inputs(PROFILE.frame(made.profile))


def layers_of(spec: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The inline rows of each layer of a chart."""
    return [
        layer["data"].get("values") or spec["datasets"][layer["data"]["name"]]
        for layer in spec["layer"]
    ]


def test_inputs_that_are_shared_are_one_input(made: Synthetic) -> None:
    rows = [
        row | {"fused": f"{row['block']}:qkv" if row["role"] == "qkv" else None}
        for row in made.profile
    ]
    found = outlier_summary.distinct_inputs(PROFILE.frame(rows))
    assert found.filter(role="qkv").height == made.blocks
    assert found.filter(role="fc1").height == 2 * made.blocks
    assert found["kurtosis"].is_sorted(descending=True)
    for block in range(made.blocks):
        (row,) = found.filter(role="qkv", block=block).to_dicts()
        assert row["kurtosis"] == max(
            r["kurtosis"]
            for r in rows
            if r["role"] == "qkv" and r["block"] == block and r["operand"] == "input"
        )


def test_token_inputs_are_the_heaviest(made: Synthetic, inputs: pl.DataFrame) -> None:
    found = outlier_summary.token_inputs(inputs, ERRORS.frame(made.errors))
    inside = [r for r in made.profile if r["operand"] == "input" and r["block"] is not None]
    want = sorted((r["kurtosis"] for r in inside), reverse=True)[: outlier_summary.MOST_INPUTS]
    assert found["kurtosis"].to_list() == want
    assert set(found["tokens"]) == {repr(made.token) + " at 7"}
    points = outlier_summary.token_points(found)
    assert points.height == 3 * found.height
    assert points["input"][0] == f"{found['role'][0]}, block {found['block'][0]}"


def test_shares_of_the_error_are_shown_where_they_are_known(
    made: Synthetic, inputs: pl.DataFrame
) -> None:
    errors = ERRORS.frame(made.errors)
    shares = {"top_tokens_error_share": 0.947, "first_tokens_error_share": 0.4}
    high = pl.col("format") != "int4-g128"
    known = errors.with_columns(
        **{name: pl.when(high).then(0.01).otherwise(value) for name, value in shares.items()}
    )
    found = outlier_summary.token_inputs(inputs, known)
    assert set(found["top_tokens_error_share"]) == {0.947}
    said = outlier_words.tokens(found, inputs)
    assert said.endswith(
        "; of its error at the lowest format the top tokens carry 95 % and the first tokens 40 %."
    )
    unknown = known.with_columns(pl.lit(None, pl.Float64).alias(name) for name in shares)
    found = outlier_summary.token_inputs(inputs, unknown)
    assert "carry" not in outlier_words.tokens(found, inputs)


def sentence(kurtosis: float, calm: float | None) -> str:
    row = {"site": "a:input", "module": "a", "operand": "input", "role": "fc2", "block": 3}
    row |= {"step": 0, "kurtosis": kurtosis, "kurtosis_without_top_tokens": calm}
    inputs = outlier_summary.distinct_inputs(PROFILE.frame([row]))
    return outlier_words.tokens(outlier_summary.token_inputs(inputs, None), inputs)


def test_the_sentence_on_tokens_follows_the_numbers() -> None:
    assert sentence(600000.0, 50.0) == (
        "A few tokens make the heaviest tail, the FC2 input of block 3: kurtosis 600k, and 50.0 "
        "without the first and the top 1 % of tokens. Leaving them out halves the kurtosis of 1 "
        "of 1 inputs."
    )
    assert "is not that of a few tokens: kurtosis 600, still 500 without" in sentence(600.0, 500.0)
    assert sentence(600.0, None).endswith("has a kurtosis of 600.")


def test_strong_tokens_count_the_inputs_they_lead() -> None:
    def row(site: str, *tokens: tuple[str, int, float]) -> dict[str, Any]:
        top = [{"sequence": 0, "position": p, "absmax": a, "text": t} for t, p, a in tokens]
        return {"site": site, "module": site, "operand": "input", "block": 0, "step": 0} | {
            "role": "fc2",
            "kurtosis": 5.0,
            "top_tokens": top,
        }

    rows = [
        row("a", ("\n", 0, 9.0), ("x", 4, 8.0)),
        row("b", ("\n", 0, 11.0)),
        row("c", ("\n", 5, 2.0)),
        row("d"),
    ]
    found = outlier_summary.strong_tokens(outlier_summary.distinct_inputs(PROFILE.frame(rows)))
    assert found.to_dicts() == [
        {"token": r"'\n'", "at": "start of a sequence", "strongest_in": 2, "absmax": 11.0},
        {"token": r"'\n'", "at": "later", "strongest_in": 1, "absmax": 2.0},
    ]


def test_channel_cells_are_those_of_a_loop(made: Synthetic, inputs: pl.DataFrame) -> None:
    cells = outlier_summary.channel_cells(inputs)
    residual = inputs.filter(pl.col("role").is_in(["qkv", "fc1"])).to_dicts()
    for cell in cells.iter_rows(named=True):
        having = [
            (row, top)
            for row in residual
            for top in row["top_channels"]
            if top["channel"] == cell["channel"]
        ]
        here = [(row, top) for row, top in having if row["block"] == cell["block"]]
        assert cell["inputs"] == len(having)
        assert cell["stability"] == max(top["stability"] for _, top in here)
        assert cell["absmax"] == max(top["absmax"] for _, top in here)
        assert cell["roles"] == ", ".join(sorted({row["role"] for row, _ in here}))
    assert cells["channel"][0] == 17
    assert cells.filter(channel=17).height == made.blocks
    roles = outlier_summary.channel_roles(inputs)
    assert roles["role"].to_list() == ["qkv", "o", "fc1", "fc2"]
    assert roles["by_chance"].to_list() == [2 / 256] * 4
    assert roles["overlap"].to_list() == [0.5, None, 0.5, None]


@pytest.mark.parametrize(
    ("stability", "overlap", "words"),
    [
        (0.95, 0.8, "stay the same from sequence to sequence (95 % of the time) and are largely"),
        (0.95, 0.5, "and are partly the same from block to block (50 % in common; 1 % by chance)"),
        (0.4, 0.1, "partly change from sequence to sequence (40 % of the time) but differ from"),
    ],
)
def test_the_sentence_on_channels(
    inputs: pl.DataFrame, stability: float, overlap: float, words: str
) -> None:
    roles = outlier_summary.channel_roles(inputs).with_columns(
        stability=pl.lit(stability), overlap=pl.lit(overlap)
    )
    cells = outlier_summary.channel_cells(inputs)
    said = outlier_words.channels(cells, roles, 30)
    assert words in said
    assert said.endswith("Channel 17 is among them in 30 of 30 inputs.")
    alone = roles.with_columns(overlap=pl.lit(None, pl.Float64))
    assert "one reader of the residual stream" in outlier_words.channels(cells, alone, 1)


def test_the_sentences_on_single_values_and_weights(made: Synthetic) -> None:
    frame = OUTLIERS.frame(made.outliers)
    found = findings.massive_channels(frame)
    assert "reaches 899, only on the first tokens of sequences" in outlier_words.massive(found)
    later = findings.massive_channels(frame.with_columns(first_tokens=pl.lit(1)))
    assert "on 4 tokens, 1 of them first in a sequence" in outlier_words.massive(later)
    weights = findings.super_weights(frame)
    assert "The first makes 75 % of an output of 880." in outlier_words.super_weights(weights)
    assert outlier_words.massive(found.clear()).startswith("None: after no block")
    assert outlier_words.super_weights(weights.clear()).startswith("None: no weight")


def test_the_sentence_on_gate_and_up_rows(made: Synthetic) -> None:
    found = outlier_summary.alignment(PROFILE.frame(made.profile))
    assert outlier_words.alignment(found) == (
        "Mean |cosine| of matching gate and up rows: 0.20; the largest is 0.75 in block 5; no two "
        "rows are near to one."
    )
    near = found.with_columns(gate_up_correlation_max=pl.lit(0.97))
    assert "their product is a square" in outlier_words.alignment(near)
    old = found.with_columns(gate_up_correlation_max=pl.lit(None, pl.Float64))
    assert outlier_words.alignment(old).endswith("rows: 0.20.")


def test_experts_never_routed_to_are_cells_of_their_own() -> None:
    rows = [
        {"operand": "input", "block": b, "expert": e, "tokens": 0 if e == 2 else 10 * (e + 1)}
        for b in range(2)
        for e in range(4)
    ]
    experts = findings.routing(PROFILE.frame(rows))
    spec = to_spec(outlier_charts.routing_map(experts))
    reached, silent, labels = layers_of(spec)
    assert {row["expert"] for row in reached} == {0, 1, 3}
    assert {row["expert"] for row in silent} == {row["expert"] for row in labels} == {2}
    assert spec["layer"][1]["mark"]["fill"] == "theme:paper"
    said = outlier_words.routing(experts)
    assert said.startswith("2 of 8 experts were never routed to and have no statistics; ")
    assert said.endswith("Outlined cells are those never routed to.")
    all_reached = experts.filter(pl.col("tokens") > 0)
    assert "Outlined" not in outlier_words.routing(all_reached)
    assert len(to_spec(outlier_charts.routing_map(all_reached))["layer"]) == 1


def test_the_report_of_experts_has_a_map_of_them(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",), blocks=2, experts=4)
    write_report([path])
    assert "r1-where-routing" in charts_of((path / "report.html").read_text())


def test_hostile_tokens_are_text_everywhere_in_the_section(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",), blocks=2, prefix=f"{HOSTILE}.layers", token=HOSTILE)
    html = where(load_run(path), "w")
    read = Reader(re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))
    assert not {"img", "script"} & set(read.tags)
    assert not [key for key, _ in read.attributes if key.startswith("on")]
    # In the table of tokens, of massive activations, and as the name of a module.
    assert read.text.count("'</script><img") >= 3
    assert f"{HOSTILE}.layers.1.mlp.down_proj" in read.text
    points = charts_of(html)["w-tokens"]
    assert "</script><img" in str(points)


def test_an_older_profile_says_what_it_lacks(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",), blocks=2)
    (path / "outliers.parquet").unlink()
    profile = pl.read_parquet(path / "profile.parquet").drop(
        "top_channel_stability", "top_channel_overlap", "gate_up_correlation_max"
    )
    profile.write_parquet(path / "profile.parquet")
    manifest = json.loads((path / "run.json").read_text())
    manifest["stages"]["profile"]["files"].remove("outliers.parquet")
    (path / "run.json").write_text(json.dumps(manifest))
    html = where(load_run(path), "w")
    assert set(charts_of(html)) == {"w-tokens"}
    assert "Massive activations and super weights were not looked for:" in html


def test_weights_alone_have_rows_of_gate_and_up_only(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",), blocks=2)
    profile = pl.read_parquet(path / "profile.parquet").filter(operand="weight")
    profile.write_parquet(path / "profile.parquet")
    html = where(load_run(path), "w")
    assert charts_of(html) == {}
    assert "No inputs in this profile" in html
    assert "Gate and up rows" in html


def test_nothing_profiled_names_the_command(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",), blocks=2)
    for name in ("profile", "errors", "sensitivity", "outliers"):
        (path / f"{name}.parquet").unlink()
    (path / "run.json").write_text('{"schema": 1, "stages": {}}')
    assert "bitplan profile MODEL -o run" in where(load_run(path), "w")
