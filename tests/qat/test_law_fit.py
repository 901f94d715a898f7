"""The fit recovers planted constants, keeps noise, refuses what it cannot carry, and reads runs."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from bitplan.cli import EXIT_BAD_INPUT, main
from bitplan.errors import DataError, FitError, RunError
from bitplan.formats import parse_format
from bitplan.law import PAPER, read_laws, write_laws
from bitplan.qat.law_fit import (
    FORMS,
    LAW,
    cells_of,
    cross_validate,
    fit,
    fit_baseline,
    pairs_of,
    quantiles,
)
from bitplan.qat.law_result import fit_law, fit_trainings
from bitplan.qat.law_runs import classify, deltas, read_trainings
from bitplan.qat.verify import verify_plan
from bitplan.rundir import file_hash
from bitplan.tables import TRAININGS

PARAMS = (1e6, 3e6, 1e7, 3e7)
TOKENS = (5e7, 2e8, 8e8)
GROUPS = (32, 64, 128, 256)
PRECISIONS = ("w4a4", "w4a16", "w16a4")


def trainings(
    *,
    noise: float = 0.0,
    seeds: int = 2,
    params: tuple[float, ...] = PARAMS,
    tokens: tuple[float, ...] = TOKENS,
    groups: tuple[int, ...] = GROUPS,
    precisions: tuple[str, ...] = PRECISIONS,
    seed: int = 0,
) -> pl.DataFrame:
    """What trainings would leave if the paper's law held exactly, with the noise of seeds."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(n: float, d: float, g: int | None, precision: str, s: int, loss: float) -> None:
        values = (int(n), int(d), g, precision, s, loss, "t", "k", "cosine")
        rows.append(dict(zip(TRAININGS.schema, values, strict=True)))

    for n, d, s in itertools.product(params, tokens, range(seeds)):
        base = PAPER.baseline.loss(n, d) + rng.normal(0, noise)
        add(n, d, None, "bf16", s, base)
        for precision, g in itertools.product(precisions, groups):
            delta = PAPER.delta(precision, n, d, g) + rng.normal(0, noise)
            add(n, d, g, precision, s, base + delta)
    return TRAININGS.frame(rows)


def cells(table: pl.DataFrame, precision: str = "w4a4") -> Any:
    return cells_of(deltas(table).filter(precision=precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exact_deltas_give_back_the_constants(precision: str) -> None:
    found = fit(cells(trainings(), precision), bootstraps=0)
    law = PAPER.laws[precision]
    for name in ("gamma_n", "gamma_d", "gamma_g", "k"):
        assert found.estimate[name] == pytest.approx(getattr(law, name), rel=1e-3)
    assert found.relative_error < 1e-4


def test_intervals_hold_the_planted_constants() -> None:
    held = []
    for seed in range(6):
        found = fit(cells(trainings(noise=0.003, seeds=3, seed=seed)), bootstraps=60)
        law = PAPER.laws["w4a4"]
        names = ("gamma_n", "gamma_d", "gamma_g")
        held += [found.low[n] <= getattr(law, n) <= found.high[n] for n in names]
        assert all(found.low[n] < found.estimate[n] < found.high[n] for n in names)
    assert sum(held) >= 15  # 18 intervals of 95 %: fewer than 15 would be one chance in 500


def test_intervals_hold_where_cells_share_the_noise_of_their_bf16() -> None:
    held, law = [], PAPER.laws["w4a4"]
    for seed in range(8):
        table = trainings(noise=0.001, seeds=2, seed=seed)
        pair = ["params", "tokens", "seed"]
        keys = table.select(pair).unique(maintain_order=True)
        rng = np.random.default_rng(seed)
        moved = keys.with_columns(shift=rng.normal(0, 0.006, keys.height))
        at = pl.col("precision") == "bf16"
        noisy = table.join(moved, on=pair, maintain_order="left").with_columns(
            loss=pl.col("loss") + pl.when(at).then("shift").otherwise(0)
        )
        found = fit(cells(noisy), bootstraps=60)
        names = ("gamma_n", "gamma_d", "gamma_g")
        held += [found.low[n] <= getattr(law, n) <= found.high[n] for n in names]
    # Drawn cell by cell the intervals of gamma_n and gamma_d held it in 7 of 10.
    assert sum(held) >= 20


def test_deltas_below_zero_stay_in_the_fit() -> None:
    table = trainings(noise=0.001, seeds=3)
    small = (pl.col("params") == PARAMS[-1]) & (pl.col("precision") == "w4a16")
    found = cells(
        table.with_columns(loss=pl.col("loss") - pl.when(small).then(0.05).otherwise(0)), "w4a16"
    )
    assert 0 < (found.delta < 0).sum() < len(found.delta) / 2
    fitted = fit(found, bootstraps=0)
    assert fitted.cells == len(PARAMS) * len(TOKENS) * len(GROUPS)
    # They pull the law down where they are: delta falls faster with N than without them.
    assert fitted.estimate["gamma_n"] > PAPER.laws["w4a16"].gamma_n * 1.1


def test_the_true_form_predicts_left_out_cells_best() -> None:
    found = cells(trainings(noise=0.0005, seeds=3))
    errors = {form.name: cross_validate(found, form) for form in FORMS}
    assert min(errors, key=lambda name: errors[name]) == LAW.name
    assert errors["without G"] > 3 * errors[LAW.name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": (1e8,)}, "2 values of tokens \\(found 1\\)"),
        ({"params": (1e6,), "groups": (64,)}, "2 values of params .*; .*group size"),
        ({"params": PARAMS[:2], "tokens": TOKENS[:2], "groups": GROUPS[:1]}, "group size"),
        ({"noise": 1.0}, "above their noise"),
    ],
)
def test_what_the_data_cannot_carry_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FitError, match=said):
        fit(cells(trainings(**options)), bootstraps=0)


def test_too_few_cells_are_refused() -> None:
    five = pl.concat(
        [
            trainings(params=PARAMS[:2], tokens=TOKENS[:1], groups=GROUPS[:2]),
            trainings(params=PARAMS[:1], tokens=TOKENS[1:2], groups=GROUPS[:1]),
        ]
    )
    with pytest.raises(FitError, match=r"at least 6 cells of \(N, D, G\) \(found 5\)"):
        fit(cells(five), bootstraps=0)


def test_the_baseline_is_recovered() -> None:
    n, d = (a.ravel() for a in np.meshgrid(PARAMS, TOKENS))
    loss = np.array([PAPER.baseline.loss(*cell) for cell in zip(n, d, strict=True)])
    found = fit_baseline(n, d, loss)
    assert found.alpha == pytest.approx(PAPER.baseline.alpha, rel=0.02)
    assert found.e == pytest.approx(PAPER.baseline.e, rel=0.02)
    with pytest.raises(FitError, match="3 values of tokens"):
        fit_baseline(n, np.full_like(d, 1e8), loss)


def test_the_command_writes_a_law_that_predict_reads(tmp_path: Path) -> None:
    source, law = tmp_path / "trainings.parquet", tmp_path / "law.json"
    trainings(noise=0.001).write_parquet(source)
    result = CliRunner().invoke(main, ["law", "fit", str(source), "-o", str(law)])
    assert result.exit_code == 0, result.output
    assert "w4a4 = " in result.output
    found = read_laws(law)
    for precision in PRECISIONS:
        expected = PAPER.delta(precision, 1e7, 2e8, 128)
        assert found.delta(precision, 1e7, 2e8, 128) == pytest.approx(expected, rel=0.05)
    asked = ["law", "predict", "--params", "1e7", "--tokens", "2e8", "--law", str(law), "--json"]
    # The fitted law has no row with FC2 at 8 bits: predict says what it has.
    told = CliRunner().invoke(main, asked)
    assert told.exit_code == 0, told.output
    value = json.loads(told.output)
    assert [row["precision"] for row in value["rows"]] == ["w4a4"]
    assert value["R"]["fc2_inputs_at_8"] is None
    assert value["R"]["all_inputs_at_4"] == pytest.approx(
        PAPER.ratio(1e7, 2e8, 128, fc2_at_8=False), rel=0.1
    )


def test_additivity_is_the_factor_between_the_sum_and_both(tmp_path: Path) -> None:
    table = trainings()
    at = pl.col("precision") == "w4a4"
    wide = deltas(table).pivot("precision", index=["params", "tokens", "group_size", "seed"])
    total = wide.select(
        "params", "tokens", "group_size", "seed", both=0.9 * (pl.col("w4a16") + pl.col("w16a4"))
    )
    base = table.filter(precision="bf16").select("params", "tokens", "seed", base="loss")
    changed = (
        table.filter(at)
        .drop("loss")
        .join(total, on=["params", "tokens", "group_size", "seed"])
        .join(base, on=["params", "tokens", "seed"])
        .with_columns(loss=pl.col("base") + pl.col("both"))
    )
    path = tmp_path / "trainings.parquet"
    pl.concat([table.filter(~at), changed.select(*TRAININGS.schema)]).write_parquet(path)
    found = fit_law([path], bootstraps=20)
    assert found.additivity is not None
    assert found.additivity[0] == pytest.approx(0.9, rel=1e-6)


def test_mixed_text_is_not_pooled(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    trainings().write_parquet(one)
    trainings(seed=1).with_columns(text=pl.lit("other")).write_parquet(two)
    with pytest.raises(DataError, match="different texts"):
        fit_law([one, two])
    assert fit_law([one, two], force=True, bootstraps=5).trainings > trainings().height
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"nothing")
    result = CliRunner().invoke(main, ["law", "fit", str(bad)])
    assert result.exit_code == EXIT_BAD_INPUT
    assert "neither a run directory nor Parquet" in result.output
    with pytest.raises(RunError):
        fit_law([tmp_path / "absent.parquet"])


@pytest.mark.parametrize(
    ("weight", "rest", "fc2", "name"),
    [
        (None, None, None, "bf16"),
        ("int4-g32", None, None, "w4a16"),
        (None, "int4-g32", "int4-g32", "w16a4"),
        ("int4-g32", "int4-g32", "int4-g32", "w4a4"),
        ("int4-g32", "int4-g32", "int8-g32", "w4a4+fc2"),
        (None, "int4-g32", "int8-g32", "w16a4+fc2"),
        ("int8-g32", "int4-g32", "int4-g32", None),
        ("int4-g32", None, "int8-g32", None),
    ],
)
def test_an_arm_is_named_by_its_formats(
    weight: str | None, rest: str | None, fc2: str | None, name: str | None
) -> None:
    role = {f"{r}:{o}": r for r in ("qkv", "o", "fc1", "fc2") for o in ("weight", "input")}
    role |= {"lm_head:weight": "lm_head", "lm_head:input": "lm_head"}
    formats = {}
    for site, r in role.items():
        chosen = weight if site.endswith(":weight") else fc2 if r == "fc2" else rest
        if chosen is not None and r != "lm_head":
            formats[site] = parse_format(chosen)
    assert classify(formats, role) == name


def test_run_directories_from_scratch_are_trainings(
    ready: Callable[..., Any], tmp_path: Path
) -> None:
    at = ready(steps=1, seeds=1)
    source = json.loads((at.run / "run.json").read_text())["model"]["source"]
    verify_plan(at.run, at.options)  # from the checkpoint: no training of the law
    assert read_trainings([at.run])[0].is_empty()
    verify_plan(at.run, replace(at.options, from_scratch=source))
    found, left_out = read_trainings([at.run])
    assert left_out == 0
    assert found["precision"].sort().to_list() == [
        "bf16",
        "w16a4",
        "w16a4+fc2",
        "w4a16",
        "w4a4",
        "w4a4+fc2",
    ]
    assert found["params"].n_unique() == 1
    assert set(found["group_size"]) == {None, 16}
    assert set(found["tokens"]) == {1 * 2 * 32}


def test_draws_of_two_precisions_are_of_the_same_pairs_and_seeds() -> None:
    table = trainings(noise=0.003, seeds=3)
    one = cells(table)
    # Of the same trainings but for one G: what is drawn is the same.
    fewer = cells(table.filter((pl.col("group_size") != 32) | pl.col("group_size").is_null()))
    pairs = pairs_of([one, fewer])
    both, same = fit(one, bootstraps=8, pairs=pairs), fit(one, bootstraps=8, pairs=pairs)
    assert both.drawn == same.drawn
    other = fit(fewer, bootstraps=8, pairs=pairs)
    of_both, of_other = ([f.drawn[i]["gamma_n"] for i in range(8)] for f in (both, other))
    assert np.corrcoef(of_both, of_other)[0, 1] > 0.8


def test_trainings_of_one_schedule_are_taken_from_a_table_of_several(tmp_path: Path) -> None:
    path = tmp_path / "trainings.parquet"
    wsd = trainings().with_columns(schedule=pl.lit("wsd"), loss=pl.col("loss") + 1)
    pl.concat([trainings(), wsd]).write_parquet(path)
    with pytest.raises(DataError, match="different schedules"):
        read_trainings([path])
    found, _ = read_trainings([path], schedule="wsd")
    assert found["loss"].sort().to_list() == wsd["loss"].sort().to_list()


def test_a_written_law_says_what_it_was_fitted_to(tmp_path: Path) -> None:
    source, law = tmp_path / "trainings.parquet", tmp_path / "law.json"
    trainings(noise=0.001).write_parquet(source)
    found = fit_law([source], law, schedule="cosine", bootstraps=20)
    written = read_laws(law)
    for name, fitted in found.fits.items():
        for constant in ("k", "gamma_n", "gamma_d", "gamma_g"):
            _, low, high = fitted.interval(constant)
            assert written.intervals[name][constant] == (low, high)
    assert written.provenance["tables"] == {str(source): file_hash(source)}
    assert written.provenance["schedule"] == "cosine"
    assert written.grid.params == (min(PARAMS), max(PARAMS))


def test_draws_that_overflow_leave_bounds_and_a_law_that_can_be_written(tmp_path: Path) -> None:
    low, high = quantiles([1.0] * 90 + [float("inf")] * 10)
    assert (low, high) == (1.0, float("inf"))
    found = fit_trainings(trainings(noise=0.001), bootstraps=5)
    name, fitted = next(iter(found.fits.items()))
    wide = replace(fitted, high={**fitted.high, "k": float("inf")})
    widened = replace(found, fits={**found.fits, name: wide})
    written = json.loads(json.dumps(widened.as_json(), allow_nan=False))
    assert written["fits"][name]["high"]["k"] is None
    laws = widened.laws("ours", {})
    write_laws(tmp_path / "law.json", laws)
    assert set(read_laws(tmp_path / "law.json").intervals[name]) == {
        "gamma_n",
        "gamma_d",
        "gamma_g",
    }
