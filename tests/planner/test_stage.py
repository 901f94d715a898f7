"""`bitplan plan` from the tables on disk to the files and the words it leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from bitplan.cli import main
from bitplan.formats import BF16, parse_format, parse_formats
from bitplan.options import PlanOptions
from bitplan.planner.plan import Plan
from bitplan.planner.stage import PlanResult, make_plan
from bitplan.rundir import RunDir
from bitplan.sites import PLANNED_ROLES, Linear, describe

FORMATS = ("int4-g128", "int8-g128")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


@pytest.fixture
def run(tables: Callable[..., Any], tmp_path: Path) -> Path:
    return tables(3).write(tmp_path / "run")


def formats(plan: Plan, operand: str) -> set[str]:
    return {str(c.format) for c in plan.sites if c.planned and c.operand == operand}


def test_without_options_it_spends_what_fc2_spends(run: Path) -> None:
    made = make_plan(run, PlanOptions())
    fc2 = make_plan(run, PlanOptions(rule="fc2"))
    mine, rule = made.plan.predicted, fc2.plan.predicted
    assert made.plan.made_by == "optimal"
    assert made.plan.budget["input_bits"] == rule.input_bits
    assert made.plan.budget["weight_bits"] == rule.weight_bits
    assert mine.input_bits is not None
    assert rule.input_bits is not None
    assert mine.input_bits <= rule.input_bits * (1 + 1e-9)
    assert mine.objective <= rule.objective
    assert formats(made.plan, "weight") == {"int4-g128"}
    assert "no budget was asked for inputs" in made.as_text()
    assert made.plan.optimality_gap == 0.0
    assert fc2.plan.optimality_gap is None


def test_groups_that_do_not_divide_a_row_are_told_once(run: Path) -> None:
    made = make_plan(run, PlanOptions())
    (note,) = [note for note in made.plan.notes if "shorter group" in note]
    assert note.startswith("rows of 42 sites")  # all: rows are 64 or 160 long
    free = make_plan(run, PlanOptions(pins=("*=bf16", "*down_proj:*=int8-g128")))
    assert any(note.startswith("rows of 6 sites") for note in free.plan.notes)


def test_the_plan_uses_what_was_measured_and_says_so(run: Path) -> None:
    site, path = "model.layers.0.mlp.down_proj:input", run / "sensitivity.parquet"
    estimates = pl.read_parquet(path)
    row = estimates.filter(site=site, format="int4-g128").with_columns(
        method=pl.lit("intervention"), delta_loss=pl.lit(0.5), stderr=pl.lit(0.01)
    )
    options = PlanOptions(pins=(f"{site}=int4-g128",))
    before = make_plan(run, options).plan
    pl.concat([estimates, row]).write_parquet(path)
    made = make_plan(run, options)
    assert not made.up_to_date
    assert "1 sites by intervention" in " ".join(made.plan.notes)
    (choice,) = [c for c in made.plan.sites if str(c.site) == site]
    assert choice.method == "intervention"
    assert choice.delta_loss == 0.5
    assert "(intervention +0.5 +- 0.01)" in choice.reason
    assert before.predicted.delta_loss is not None
    assert made.plan.predicted.delta_loss is not None
    assert made.plan.predicted.delta_loss > before.predicted.delta_loss


def test_predictions_are_the_sums_of_the_sites(run: Path) -> None:
    plan = make_plan(run, PlanOptions(input_bits=5.0, weight_bits=4.8)).plan
    sums = {
        operand: sum(c.delta_loss or 0.0 for c in plan.sites if c.operand == operand)
        for operand in ("weight", "input")
    }
    p = plan.predicted
    assert p.delta_loss_weights == pytest.approx(sums["weight"])
    assert p.delta_loss_inputs == pytest.approx(sums["input"])
    assert p.delta_loss == pytest.approx(sums["weight"] + sums["input"])
    assert pytest.approx(sums["input"] / sums["weight"]) == p.R
    for choice in plan.sites:
        if not choice.planned:
            assert choice.format == BF16
            assert choice.forced == "role"


def test_fused_sites_share_a_format_and_roles_do_when_asked(run: Path) -> None:
    plan = make_plan(run, PlanOptions(input_bits=5.0, weight_bits=5.0)).plan
    found = plan.assignment
    for block in range(3):
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            for operand in ("weight", "input"):
                assert len({found[f"model.layers.{block}.{n}:{operand}"] for n in names}) == 1
    plan = make_plan(run, PlanOptions(input_bits=5.0, weight_bits=5.0, per_role=True)).plan
    chosen: dict[tuple[str, str], set[str]] = {}
    for choice in plan.sites:
        chosen.setdefault((choice.role, choice.operand), set()).add(str(choice.format))
    assert all(len(found) == 1 for found in chosen.values())


def test_the_same_again_is_up_to_date_and_bit_for_bit_the_same(
    run: Path, tables: Callable[..., Any], tmp_path: Path
) -> None:
    first = make_plan(run, PlanOptions(input_bits=5.0))
    texts = {name: (run / name).read_bytes() for name in ("plan.json", "frontier.parquet")}
    again = make_plan(run, PlanOptions(input_bits=5.0))
    assert (first.up_to_date, again.up_to_date) == (False, True)
    assert again.plan == first.plan
    assert again.frontier.equals(first.frontier)
    assert again.as_text() == first.as_text().replace("wrote:", "up to date:")
    twin = tables(3).write(tmp_path / "twin")
    make_plan(twin, PlanOptions(input_bits=5.0))
    assert {name: (twin / name).read_bytes() for name in texts} == texts


def test_a_new_profile_makes_a_new_plan(run: Path, tables: Callable[..., Any]) -> None:
    make_plan(run, PlanOptions())
    tables(3, seed=1).write(run)
    assert not make_plan(run, PlanOptions()).up_to_date


def test_a_damaged_plan_is_made_again(run: Path) -> None:
    first = make_plan(run, PlanOptions())
    (run / "plan.json").write_text("{")
    again = make_plan(run, PlanOptions())
    assert not again.up_to_date
    assert again.plan == first.plan


def test_the_frontier_falls_and_holds_the_rules_and_the_plan(run: Path) -> None:
    made = make_plan(run, PlanOptions(input_bits=5.0))
    points = made.frontier.filter(pl.col("label") == "optimal")
    assert len(points) >= 20
    assert points["limit"].is_sorted()
    assert (points["cost"] <= points["limit"] * (1 + 1e-9)).all()
    assert points["delta_loss"].is_sorted(descending=True)
    assert points["plan_id"].n_unique() > 3
    labels = set(made.frontier["label"])
    assert labels == {
        "optimal",
        "plan",
        "uniform",
        "uniform-8",
        "fc2",
        "first-last",
        "kurtosis",
        "sqnr",
    }
    mine = made.frontier.row(by_predicate=pl.col("label") == "plan", named=True)
    assert mine["plan_id"] == made.plan.plan_id
    assert mine["delta_loss"] == pytest.approx(made.plan.predicted.delta_loss)
    # No rule lies below the frontier, where it keeps the frontier's limit on weights.
    for name in ("uniform", "fc2", "kurtosis", "sqnr"):
        rule = made.frontier.row(by_predicate=pl.col("label") == name, named=True)
        dearer = points.filter(pl.col("limit") >= rule["cost"])
        assert (dearer["delta_loss"] <= rule["delta_loss"] * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"bit_ops": 3.5e6},
        {"bytes": 80_000.0},
        {"time": "H200=0.003", "formats": ("int4-g128", "int8-g128", "bf16")},
        {"weight_bits": 5.0},
    ],
)
def test_any_budget_makes_a_plan_and_a_frontier_over_itself(
    tables: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    run = tables(3).write(tmp_path / "run")
    made = make_plan(run, PlanOptions(**options))
    (name, value), *_ = [(k, v) for k, v in made.plan.budget.items() if k in options]
    points = made.frontier.filter(pl.col("label") == "optimal")
    assert set(made.frontier["budget"]) == {name}
    assert points["delta_loss"].is_sorted(descending=True)
    mine = made.frontier.row(by_predicate=pl.col("label") == "plan", named=True)
    assert mine["cost"] <= value * (1 + 1e-9)
    if name == "time":
        assert made.plan.device == "H200"
        assert made.plan.predicted.time_ms == pytest.approx(mine["cost"])


def with_input_harm(tables: Callable[..., Any], factor: float) -> Any:
    made = tables(3)
    scale = pl.when(pl.col("site").str.ends_with(":input")).then(factor).otherwise(1.0)
    made.sensitivity = made.sensitivity.with_columns(pl.col("delta_loss") * scale)
    return made


def test_converge_finds_the_fewest_input_bits(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = with_input_harm(tables, 20.0).write(tmp_path / "run")
    made = make_plan(run, PlanOptions(converge=True))
    p = made.plan.predicted
    assert p.R is not None
    assert p.input_bits is not None
    assert p.R <= 1 + 1e-9
    assert formats(made.plan, "weight") == {"int4-g128"}
    assert formats(made.plan, "input") == set(FORMATS)
    # With fewer input bits the least loss of the inputs is above that of the weights.
    fewer = make_plan(run, PlanOptions(input_bits=p.input_bits - 1e-3)).plan.predicted
    assert fewer.R is not None
    assert fewer.R > 1


def test_converge_says_when_it_cannot(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = with_input_harm(tables, 1e5).write(tmp_path / "run")
    made = make_plan(run, PlanOptions(converge=True))
    assert made.plan.predicted.R is not None
    assert made.plan.predicted.R > 1
    assert formats(made.plan, "input") == {"int8-g128"}
    said = [note for note in made.plan.notes if note.startswith("converge")]
    assert f"R = {made.plan.predicted.R:.3f} at best" in said[0]


def test_without_sensitivity_no_loss_is_predicted(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    made = tables(2)
    made.sensitivity = None
    result = make_plan(made.write(tmp_path / "run"), PlanOptions(input_bits=5.0))
    assert result.plan.predicted.delta_loss is None
    assert result.plan.predicted.R is None
    assert result.plan.predicted.objective > 0
    assert result.frontier["delta_loss"].is_null().all()
    text = " ".join(result.as_text().split())
    assert "no sensitivity was profiled" in text
    assert "nats" not in text


def test_weights_only_plans_weights(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(3, inputs=False).write(tmp_path / "run")
    made = make_plan(run, PlanOptions(weight_bits=5.0))
    assert {c.operand for c in made.plan.sites} == {"weight"}
    assert formats(made.plan, "weight") == set(FORMATS)
    assert made.plan.predicted.input_bits is None
    assert "weights only were profiled" in made.as_text()


def test_every_site_has_a_reason_with_what_the_next_best_costs(run: Path) -> None:
    plan = make_plan(
        run,
        PlanOptions(
            input_bits=5.0, weight_bits=5.0, pins=("model.layers.1.mlp.down_proj=int8-g128",)
        ),
    ).plan
    for choice in plan.sites:
        assert "\n" not in choice.reason
        if choice.forced == "pin":
            assert "pinned by model.layers.1.mlp.down_proj=int8-g128" in choice.reason
        elif choice.planned:
            assert choice.next_best is not None
            assert choice.next_best.format != str(choice.format)
            raised = choice.format == parse_format("int8-g128")
            assert (choice.next_best.delta_loss >= 0) is raised
            assert (choice.next_best.bits < 0) is raised
            assert f"{choice.next_best.format} would {'add' if raised else 'save'}" in choice.reason
    assert {"pin", "role", None} <= {c.forced for c in plan.sites}
    lowest = make_plan(run, PlanOptions(input_bits=5.0)).plan
    assert {c.forced for c in lowest.sites if c.operand == "weight"} == {"budget", "role"}


def test_kurtosis_that_misleads_is_flagged(tables: Callable[..., Any], tmp_path: Path) -> None:
    made = tables(4)
    site = "model.layers.2.mlp.down_proj:input"
    here = pl.col("site") == site
    made.profile = made.profile.with_columns(kurtosis=pl.when(here).then(5000.0).otherwise(4.0))
    made.sensitivity = made.sensitivity.with_columns(
        delta_loss=pl.when(here).then(1e-9).otherwise("delta_loss")
    )
    plan = make_plan(made.write(tmp_path / "run"), PlanOptions()).plan
    flagged = [c.site for c in plan.sites if "kurtosis" in c.reason]
    assert flagged == [site]


@pytest.mark.parametrize("blocks", [1, 12, 60, 90])
def test_the_text_fits_a_terminal(tables: Callable[..., Any], tmp_path: Path, blocks: int) -> None:
    run = tables(blocks, keep=("q_proj", "k_proj", "down_proj")).write(tmp_path / "r")
    made = make_plan(run, PlanOptions())
    lines = made.as_text().splitlines()
    # Paths may be longer than any terminal.
    assert max(len(line) for line in lines[:-2]) <= 100
    assert lines[-1] == f"next: bitplan verify {run}"
    assert "plan.json" in lines[-2]
    row = "".join(line.split()[1] for line in lines if line.startswith("fc2:input"))
    expected = "".join(
        "." if c.format.bits == 4 else "8"
        for c in made.plan.sites
        if c.role == "fc2" and c.operand == "input"
    )
    assert row == expected


def test_the_command_prints_text_and_json(run: Path) -> None:
    done = invoke(run, "--input-bits", "5")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "fc2:input" in done.stdout
    as_json = invoke(run, "--input-bits", "5", "--json")
    value = json.loads(as_json.stdout)
    assert value["up_to_date"] is True
    assert value["plan"] == json.loads((run / "plan.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--input-bits", "4"), "the smallest that can be met is 4."),
        (("--bytes", "1"), "the smallest that can be met is"),
        (("--input-bits", "nan"), "give a number above 0"),
        (("--weight-bits", "-3"), "give a number above 0"),
        (("--rule", "fc3"), "unknown rule 'fc3'"),
        (("--rule", "fc2", "--input-bits", "5"), "whole plan"),
        (("--converge", "--bit-ops", "1e9"), "--converge"),
        (("--measure", "4", "--tokens", "1e9"), "give one of them"),
        (("--pin", "nothing=int8-g128"), "matches no site"),
        (("--formats", "int9"), "unknown format"),
        (("--formats", "int6-g128"), "profile again with --formats int6-g128"),
        (("--formats", "int4-g*"), "it has int4-g128, int8-g128: profile again with"),
        (("--share", "fc3:input=int8-g128>=0.5"), "--share"),
        (("--rule", "fc2", "--share", "fc2:input=int8-g128>=0.5"), "whole plan"),
        (("--pin", "fc2=int8-g128", "--pin", "fc2=int4-g128"), "has no effect"),
        (("--formats", "int8-channel"), "applies to inputs"),
        (("--time", "TPU=3"), "H200"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    run: Path, arguments: tuple[str, ...], said: str
) -> None:
    make_plan(run, PlanOptions())
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = invoke(run, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sensitivity_that_is_no_number_is_told(run: Path, value: float) -> None:
    path, site = run / "sensitivity.parquet", "model.layers.1.mlp.down_proj:input"
    here = (pl.col("site") == site) & (pl.col("format") == "int4-g128")
    frame = pl.read_parquet(path).with_columns(
        delta_loss=pl.when(here).then(value).otherwise("delta_loss")
    )
    frame.write_parquet(path)
    done = invoke(run)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"NaN or infinite values in 1 rows (the first: {site} in int4-g128)" in done.stderr
    assert not (run / "plan.json").exists()


def test_a_profile_of_another_checkpoint_is_told(
    run: Path, tables: Callable[..., Any], tmp_path: Path
) -> None:
    # One block more, without provenance; then the same sites with another model's provenance.
    tables(4).sensitivity.write_parquet(run / "sensitivity.parquet")
    done = invoke(run)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "lacks (model.layers.3." in done.stderr
    assert "of another checkpoint; profile again" in done.stderr
    other = RunDir.create(tmp_path / "other")
    with other.lock():
        made = {"sensitivity.parquet": tables(3).sensitivity}
        other.commit("profile", {}, made, model={"content_hash": "f" * 16})
    (tmp_path / "other" / "sensitivity.parquet").rename(run / "sensitivity.parquet")
    done = invoke(run)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "was made from another checkpoint (content hash ffffffffffff" in done.stderr


def test_what_is_pinned_to_bf16_is_out_of_the_averages_and_the_text_says_so(run: Path) -> None:
    free = make_plan(run, PlanOptions(rule="uniform"))
    made = make_plan(run, PlanOptions(rule="uniform", pins=("model.layers.0.*=bf16",)))
    assert made.plan.predicted.input_bits == pytest.approx(free.plan.predicted.input_bits)
    assert made.plan.predicted.bytes == pytest.approx(free.plan.predicted.bytes * 2 / 3)
    text = " ".join(made.as_text().split())
    assert "14 sites are kept at bf16 by model.layers.0.*=bf16: outside every average" in text
    assert "qkv bf16 (6 sites), outside the averages" in text
    kept = [c for c in made.plan.sites if c.block == 0]
    assert {(c.planned, c.forced) for c in kept} == {(False, "pin")}
    assert all("outside the averages" in c.reason for c in kept)


def test_group_sizes_are_choices_priced_by_their_scales(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    """Longer rows than any group, one no multiple of it, inputs and weights at once."""
    shapes = {"self_attn.q_proj": 512, "self_attn.k_proj": 512, "mlp.down_proj": 1000}
    linears = describe(
        [Linear(f"model.layers.{b}.{n}", k, 256) for b in range(3) for n, k in shapes.items()],
        family="llama",
    )
    names = [str(f) for f in parse_formats(["int4-g*", "int8-g128"])]
    made = tables(linears=linears, formats=names)
    scope = {"g32": 0.5, "g64": 0.7, "g128": 0.9, "g256": 1.2, "token": 2.0, "channel": 2.0}
    factor = pl.col("format").str.split("-").list.last().replace_strict(scope)
    made.sensitivity = made.sensitivity.with_columns(pl.col("delta_loss") * factor)
    run = made.write(tmp_path / "run")
    result = make_plan(
        run, PlanOptions(formats=("int4-g*", "int8-g128"), input_bits=4.2, weight_bits=4.15)
    )
    plan = result.plan
    assert plan.formats == tuple(names)
    for operand, row, limit in (("input", "int4-token", 4.2), ("weight", "int4-channel", 4.15)):
        used = formats(plan, operand)
        assert len(used) > 1
        assert used <= {*names} - {"int4-token", "int4-channel"} | {row}
        mine = [c for c in plan.sites if c.operand == operand]
        rows = {f"{x.module}:{operand}": x.in_features for x in linears}
        for c in mine:
            length = rows[c.site]
            scales = -(-length // (c.format.group_size or length))
            assert c.bits == pytest.approx(c.format.bits + 16 * scales / length)
        size = sum(rows[c.site] * 256 for c in mine)
        average = sum(c.bits * rows[c.site] * 256 for c in mine) / size
        assert average == pytest.approx(getattr(plan.predicted, f"{operand}_bits"))
        assert average <= limit
    assert 1000 % 128
    # A whole row is a token of an input and a channel of a weight: the cheapest of both, one mark.
    rows_alone = make_plan(run, PlanOptions(formats=("int4-g*",), rule="uniform")).as_text()
    assert ". int4-channel (9 sites)   . int4-token (9 sites)" in rows_alone
    found = plan.assignment
    for block in range(3):
        pair = [f"model.layers.{block}.self_attn.{n}_proj" for n in "qk"]
        for operand in ("input", "weight"):
            assert len({found[f"{module}:{operand}"] for module in pair}) == 1


def test_time_is_that_of_the_published_rate_and_names_its_source(run: Path) -> None:
    """4-bit weights with 8-bit inputs run at the 8-bit rate, on a device that has a 4-bit one."""
    pins = tuple(
        f"{role}:{operand}=int{bits}-g128"
        for role in PLANNED_ROLES
        for operand, bits in (("weight", 4), ("input", 8))
    )
    made = make_plan(run, PlanOptions(time="A100=1", pins=pins))
    macs = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 160)
    assert made.plan.predicted.time_ms == pytest.approx(2 * macs * 4096 / 624e12 * 1e3)
    assert "NVIDIA A100 Tensor Core GPU Architecture whitepaper" in " ".join(made.as_text().split())


def test_a_run_that_is_not_profiled_is_told(tmp_path: Path) -> None:
    done = invoke(tmp_path)
    assert done.exit_code == 2
    assert "bitplan profile" in done.stderr


@pytest.mark.parametrize(
    "options", [PlanOptions(input_bits=5.0), PlanOptions(converge=True), PlanOptions(rule="fc2")]
)
def test_weights_only_refuses_what_needs_inputs(
    tables: Callable[..., Any], tmp_path: Path, options: PlanOptions
) -> None:
    run = tables(1, inputs=False).write(tmp_path / "run")
    with pytest.raises(ValueError, match="weights only"):
        make_plan(run, options)
    assert not (run / "plan.json").exists()


def test_results_are_values(run: Path) -> None:
    made = make_plan(run, PlanOptions())
    assert isinstance(made, PlanResult)
    with pytest.raises(AttributeError):
        made.plan.made_by = "me"  # type: ignore[misc]
