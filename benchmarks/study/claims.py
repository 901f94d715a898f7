"""The paper's findings as claims about numbers, and the rule that says whether ours bear them out.

A claim says in which range a number lies: an exponent above 0, a ratio within [0.8, 1.25]. From the
95 % interval of our number follows the verdict, and from nothing else:

    reproduced       the interval lies within the range, and no single cell contradicts it
    not reproduced   the interval lies outside the range, or single cells contradict it: by more
                     than their noise, at 95 % for all cells together (Bonferroni)
    undetermined     the interval contains an end of the range, or there is none, as where the
                     trainings that it takes are not there or `law fit` refuses them

Intervals are of three kinds. Of a fitted constant, and of a difference of two: the bootstrap of
`law fit`, whose draws are common to the precisions. Of a mean over the grid: Student's over the
pairs (N, D), since cells of a pair share their bf16 and so its noise. Of a ratio of two such means:
Fieller's, over the same pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy import stats
from study import CELL, PAIR, WORDS, Study

from bitplan.law import FC2_AT_8, Law, LawSet
from bitplan.qat.law_fit import CONFIDENCE, Fit, quantiles
from bitplan.qat.verdict import TOLERANCE, fieller

REPRODUCED, NOT_REPRODUCED, UNDETERMINED = "reproduced", "not reproduced", "undetermined"
PLAIN = ("w4a4", "w4a16", "w16a4")
WEIGHTS, INPUTS, BOTH = "w4a16", "w16a4", "w4a4"
MIDDLE = 128
"""G of what is told of one G, as in the paper."""
GROUPS = {
    "G = 32": pl.col("group_size") == 32,
    f"G = {MIDDLE}": pl.col("group_size") == MIDDLE,
    "G from 256 on": pl.col("group_size") >= 256,
}
FINE, _, COARSE = GROUPS
SYMBOLS = {"gamma_n": "gamma_N", "gamma_d": "gamma_D", "gamma_g": "gamma_G", "k": "k"}


class NotMeasured(Exception):
    """The trainings for a number are not there; the text says which are missing."""


@dataclass(frozen=True)
class Measured:
    """Our number with its interval; bounds are None where it has none."""

    estimate: float
    low: float | None = None
    high: float | None = None
    about: str = ""
    """What it is over, in words."""
    contrary: int = 0
    """Cells that contradict the claim by more than their noise."""


@dataclass(frozen=True)
class Claim:
    """What the paper found, as the range that a number lies in."""

    finding: int
    statement: str
    paper: str
    """Its number there."""
    holds: tuple[float, float]
    measure: Callable[[Study], Measured]
    show: Callable[[float], str]


def judge(found: Measured, holds: tuple[float, float]) -> str:
    """Return the verdict on a number that should lie in a range."""
    if found.contrary:
        return NOT_REPRODUCED
    if found.low is None or found.high is None:
        return UNDETERMINED
    if holds[0] < found.low and found.high < holds[1]:
        return REPRODUCED
    return NOT_REPRODUCED if found.high <= holds[0] or found.low >= holds[1] else UNDETERMINED


def fit_of(study: Study, precision: str) -> Fit:
    """Return a precision's fit; raise NotMeasured with `law fit`'s reason where it has none."""
    if study.fitted is None:
        raise NotMeasured(study.refused)
    if precision not in study.fitted.fits:
        raise NotMeasured(study.fitted.refused.get(precision, f"no training of {WORDS[precision]}"))
    return study.fitted.fits[precision]


def constant(precision: str, name: str) -> Callable[[Study], Measured]:
    """Measure a fitted constant."""

    def measure(study: Study) -> Measured:
        fit = fit_of(study, precision)
        return Measured(*fit.interval(name), f"{fit.cells} cells")

    return measure


def difference(larger: str, smaller: str, name: str) -> Callable[[Study], Measured]:
    """Measure how far a constant of one precision is above that of another."""

    def measure(study: Study) -> Measured:
        a, b = fit_of(study, larger), fit_of(study, smaller)
        common = sorted(a.drawn.keys() & b.drawn.keys())
        return Measured(
            a.estimate[name] - b.estimate[name],
            *quantiles([a.drawn[i][name] - b.drawn[i][name] for i in common]),
        )

    return measure


def by_pair(frame: pl.DataFrame, *names: str) -> np.ndarray[Any, Any]:
    """Return the means of the columns in every (N, D), [column, pair]."""
    means = frame.group_by(PAIR, maintain_order=True).agg(pl.col(name).mean() for name in names)
    return means.select(names).to_numpy().T


def student(values: np.ndarray[Any, Any]) -> tuple[float, float | None, float | None]:
    """Return the mean of independent values with Student's interval."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    half = float(quantile * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def ratio(below: str, above: str, group: str | None = None) -> Callable[[Study], Measured]:
    """Measure the delta of `above` over that of `below`, summed over the cells that have both.

    group: of GROUPS; None: all.
    """

    def measure(study: Study) -> Measured:
        wide = _cells(study, below, above, group=group)
        means = by_pair(wide, below, above)
        pairs = means.shape[1]
        x, y = (float(v) for v in means.mean(1))
        if pairs < 2:
            return Measured(y / x, about=_over(wide))
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1)
        found = fieller(x, y, quantile**2 * np.cov(means) / pairs)
        return Measured(y / x, found.low, found.high, _over(wide))

    return measure


def every_ratio(below: str, above: str) -> Callable[[Study], Measured]:
    """Measure the ratio, and count the cells where `above` lies clearly under `below`."""

    def measure(study: Study) -> Measured:
        found = ratio(below, above)(study)
        wide = study.beside(below, above)
        less = wide[above] - wide[below]
        # Both share their bf16, so the noise of their difference is about that of one delta.
        return _counted(study, found, less, "R above 1")

    return measure


def every_delta(study: Study) -> Measured:
    """Measure the mean delta of the plain precisions, and count the cells clearly below 0."""
    cells = study.cells.filter(pl.col("precision").is_in(PLAIN))
    if cells.is_empty():
        raise NotMeasured("no quantized training with its bf16")
    found = Measured(*student(by_pair(cells, "delta")[0]), _over(cells))
    return _counted(study, found, cells["delta"], "above 0")


def _counted(study: Study, found: Measured, values: pl.Series, words: str) -> Measured:
    """Add in how many cells a number is above 0, and in how many clearly below.

    Without seeds the noise of a training is not known, and no single cell contradicts.
    """
    known = study.noise.freedom > 0
    clear = stats.norm.ppf(1 - (1 - CONFIDENCE) / 2 / len(values)) * study.noise.std
    return Measured(
        found.estimate,
        found.low,
        found.high,
        f"{words} in {int((values > 0).sum())} of {len(values)} cells",
        int((values < -clear).sum()) if known else 0,
    )


def reduction(whole: str, group: str) -> Callable[[Study], Measured]:
    """Measure by what share 8 bits at the inputs of FC2 lower delta."""

    def measure(study: Study) -> Measured:
        found = ratio(whole, whole + FC2_AT_8, group)(study)
        low, high = (None if b is None else 1 - b for b in (found.high, found.low))
        return Measured(1 - found.estimate, low, high, found.about)

    return measure


def more_at_coarse(study: Study) -> Measured:
    """Measure how much more FC2 at 8 bits saves at the coarse G than at the fine one, as shares.

    The interval is of the first-order expansion of both ratios, over the pairs that have both.
    """
    fixed = BOTH + FC2_AT_8
    fine, coarse = (
        _cells(study, BOTH, fixed, group=group)
        .group_by(PAIR, maintain_order=True)
        .agg(pl.col(BOTH, fixed).mean())
        for group in (FINE, COARSE)
    )
    wide = fine.join(coarse, on=PAIR, suffix="_coarse", maintain_order="left")
    if wide.is_empty():
        raise NotMeasured(f"no (N, D) has it at {FINE} and at {COARSE}")
    x, y, u, v = by_pair(wide, BOTH, fixed, f"{BOTH}_coarse", f"{fixed}_coarse")
    left, left_coarse = y.mean() / x.mean(), v.mean() / u.mean()
    parts = (y - left * x) / x.mean() - (v - left_coarse * u) / u.mean()
    _, low, high = student(parts)
    middle = float(left - left_coarse)
    about = f"{len(x)} (N, D)"
    if low is None or high is None:
        return Measured(middle, about=about)
    return Measured(middle, middle + low, middle + high, about)


def _cells(study: Study, *precisions: str, group: str | None = None) -> pl.DataFrame:
    wide = study.beside(*precisions)
    if group is not None:
        wide = wide.filter(GROUPS[group])
    if wide.is_empty():
        at = "" if group is None else f" at {group}"
        raise NotMeasured(f"no cell has {' and '.join(WORDS[p] for p in precisions)}{at}")
    return wide


def _over(cells: pl.DataFrame) -> str:
    return f"{cells.height} cells of {cells.select(PAIR).n_unique()} (N, D)"


def crossover(*, fc2_at_8: bool) -> Callable[[Study], Measured]:
    """Measure the tokens per parameter at which R is 1, by the fitted laws at the middle N."""

    def measure(study: Study) -> Measured:
        inputs, weights = (
            fit_of(study, INPUTS + FC2_AT_8 * fc2_at_8),
            fit_of(study, WEIGHTS),
        )
        params = middle_params(study)

        def at(a: Any, b: Any) -> float:
            return _crossing(Law(**a), Law(**b), params) / params

        common = sorted(inputs.drawn.keys() & weights.drawn.keys())
        drawn = np.array([at(inputs.drawn[i], weights.drawn[i]) for i in common])
        low, high = (_quantile(drawn, tail) for tail in (1 - CONFIDENCE, 1 + CONFIDENCE))
        return Measured(
            at(inputs.estimate, weights.estimate),
            low,
            high,
            f"N {params / 1e6:.3g}M, G {MIDDLE}; none in {np.isinf(drawn).mean():.0%} of the draws",
        )

    return measure


def middle_params(study: Study) -> float:
    """Return the geometric mean of the different N."""
    return float(np.exp(np.log(study.cells["params"].unique().to_numpy()).mean()))


def _crossing(inputs: Law, weights: Law, params: float) -> float:
    """Return the D at which both cost the same; infinite where the weights never catch up."""
    grows = weights.gamma_d - inputs.gamma_d
    if grows <= 0:
        return math.inf
    at_one = inputs.delta(params, 1.0, MIDDLE) / weights.delta(params, 1.0, MIDDLE)
    exponent = math.log(at_one) / grows
    return math.exp(exponent) if exponent < 700 else math.inf


def _quantile(values: np.ndarray[Any, Any], twice_tail: float) -> float:
    """Return a quantile of values of which some may be infinite: the next of them upwards."""
    return float(np.quantile(values, twice_tail / 2, method="higher"))


def _kurtosis(study: Study, precision: str) -> pl.DataFrame:
    """Return PAIR, seed and the last kurtosis of every role; of 4 bits, at the paper's G."""
    rows = study.kurtosis.filter(precision=precision, at="last")
    if precision != "bf16":
        rows = rows.filter(group_size=MIDDLE)
    if rows.is_empty():
        where = "" if precision == "bf16" else f" at G = {MIDDLE}"
        raise NotMeasured(f"no recorded kurtosis of {WORDS[precision]}{where}")
    return rows.pivot("role", index=[*PAIR, "seed"], values="kurtosis").drop_nulls()


OTHERS = ("qkv", "o", "fc1")


def heaviest(study: Study) -> Measured:
    """Measure the kurtosis of FC2's input in bf16 over that of the next role."""
    rows = _kurtosis(study, "bf16").with_columns(
        log=(pl.col("fc2") / pl.max_horizontal(OTHERS)).log()
    )
    return _exponent(rows)


def kept(study: Study) -> Measured:
    """Measure what W4A4 leaves of FC2's kurtosis over what it leaves of the other roles'."""
    return _exponent(_left(study).with_columns(log=pl.col("fc2_left") - pl.col("others_left")))


def left_of(which: str) -> Callable[[Study], Measured]:
    """Measure the kurtosis under W4A4 over that in bf16, of FC2's input or of the others'."""
    return lambda study: _exponent(_left(study).with_columns(log=f"{which}_left"))


def _left(study: Study) -> pl.DataFrame:
    both = _kurtosis(study, "bf16").join(
        _kurtosis(study, BOTH), on=[*PAIR, "seed"], suffix="_4", maintain_order="left"
    )
    logs = {role: (pl.col(f"{role}_4") / pl.col(role)).log() for role in (*OTHERS, "fc2")}
    return both.with_columns(
        fc2_left=logs["fc2"], others_left=pl.mean_horizontal(logs[role] for role in OTHERS)
    )


def _exponent(rows: pl.DataFrame) -> Measured:
    if rows.is_empty():
        raise NotMeasured("no W4A4 with a recorded bf16 beside it")
    found = student(by_pair(rows, "log")[0])
    middle, low, high = (None if v is None else math.exp(v) for v in found)
    assert middle is not None
    return Measured(middle, low, high, f"{rows.select(PAIR).n_unique()} (N, D)")


def tokens_exponent(study: Study, precision: str, cells: pl.DataFrame | None = None) -> Measured:
    """Measure gamma_D alone: the slope of log delta over log D, with a level for every N.

    delta is the mean over the G that all D of an N have. `cells`: of these CELLs alone. Student's
    interval from the scatter about the lines; there is none without a third D at some N.
    """
    rows = study.of(precision)
    if cells is not None:
        rows = rows.join(cells, on=CELL, how="semi")
    by_params = rows.group_by("params").agg(pl.col("tokens").n_unique().alias("all"))
    whole = rows.join(by_params, on="params").filter(
        pl.col("tokens").n_unique().over("params", "group_size") == pl.col("all"),
        pl.col("all") > 1,
    )
    if whole.is_empty():
        raise NotMeasured(f"no N and G has {WORDS[precision]} at several D")
    means = whole.group_by(PAIR, maintain_order=True).agg(pl.col("delta").mean())
    if means["delta"].min() <= 0:
        raise NotMeasured("a delta is not above 0, so it has no logarithm")
    logs = means.with_columns(x=pl.col("tokens").log(), y=pl.col("delta").log()).with_columns(
        pl.col(name) - pl.col(name).mean().over("params") for name in ("x", "y")
    )
    x, y = logs["x"].to_numpy(), logs["y"].to_numpy()
    slope = float(x @ y / (x @ x))
    freedom = len(x) - means["params"].n_unique() - 1
    about = f"{len(x)} (N, D)"
    if freedom < 1:
        return Measured(slope, about=about)
    error = math.sqrt(float(((y - slope * x) ** 2).sum()) / freedom / float(x @ x))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error)
    return Measured(slope, slope - half, slope + half, about)


def plain(value: float) -> str:
    """Show an exponent or a ratio."""
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def percent(value: float) -> str:
    """Show a share."""
    return f"{value:.1%}"


def claims(paper: LawSet) -> list[Claim]:
    """Return the paper's findings 1 to 5 as claims, with its numbers."""
    laws = paper.laws
    at = {"params": 594.5e6, "tokens": 100e9, "group_size": float(MIDDLE)}
    saved = 1 - laws[BOTH + FC2_AT_8].delta(*at.values()) / laws[BOTH].delta(*at.values())
    positive, above_one = (0.0, math.inf), (1.0, math.inf)

    def gap(a: str, b: str, name: str) -> str:
        return f"{getattr(laws[a], name) - getattr(laws[b], name):.4f}"

    def above(finding: int, a: str, b: str, name: str) -> Claim:
        text = f"{SYMBOLS[name]}: {WORDS[a]} less {WORDS[b]} is above 0"
        return Claim(finding, text, gap(a, b, name), positive, difference(a, b, name), plain)

    exponents = [
        Claim(
            1,
            f"delta {way}: {SYMBOLS[name]} of {WORDS[precision]} is above 0",
            f"{getattr(laws[precision], name):.4f}",
            positive,
            constant(precision, name),
            plain,
        )
        for way, name in (
            ("falls with N", "gamma_n"),
            ("rises with D", "gamma_d"),
            ("rises with G", "gamma_g"),
        )
        for precision in PLAIN
    ]
    saves = [
        Claim(
            4,
            f"FC2 input at 8 bits lowers delta of W4A4 at {group}",
            text,
            positive,
            reduction(BOTH, group),
            percent,
        )
        for group, text in zip(
            GROUPS,
            ("20.5%", f"{saved:.1%} (its law at 594.5M, 100B)", "42.9% (G = 256)"),
            strict=True,
        )
    ]
    return [
        Claim(
            1,
            "delta is above 0 in every cell (its mean)",
            "all cells",
            positive,
            every_delta,
            plain,
        ),
        *exponents,
        above(1, INPUTS, BOTH, "gamma_g"),
        above(1, BOTH, WEIGHTS, "gamma_g"),
        above(1, WEIGHTS, INPUTS, "gamma_d"),
        Claim(
            2,
            "R is above 1 in every cell: activation-limited",
            "1.20 to 1.67",
            above_one,
            every_ratio(WEIGHTS, INPUTS),
            plain,
        ),
        Claim(
            3,
            "BF16: kurtosis of the FC2 input over that of the next role is above 1",
            "FC2 123; others lower",
            above_one,
            heaviest,
            plain,
        ),
        Claim(
            3,
            "W4A4 lowers the kurtosis of the QKV, O and FC1 inputs: W4A4 over BF16 is below 1",
            "lowered",
            (-math.inf, 1.0),
            left_of("others"),
            plain,
        ),
        Claim(
            3,
            "and that of the FC2 input less so: FC2's W4A4 over BF16, over the others', above 1",
            f"FC2 {89 / 123:.2f}",
            above_one,
            kept,
            plain,
        ),
        *saves,
        Claim(
            4,
            f"and more so at {COARSE} than at {FINE} (difference of the shares)",
            "22.4%",
            positive,
            more_at_coarse,
            percent,
        ),
        Claim(
            4,
            "FC2 input at 8 bits lowers R: R with it over R without is below 1",
            "lowered",
            (-math.inf, 1.0),
            ratio(INPUTS, INPUTS + FC2_AT_8),
            plain,
        ),
        Claim(
            4,
            f"with it the errors converge: R within {TOLERANCE[0]:g} to {TOLERANCE[1]:g}",
            "0.85 to 1.10",
            TOLERANCE,
            ratio(WEIGHTS, INPUTS + FC2_AT_8),
            plain,
        ),
        above(5, WEIGHTS, INPUTS + FC2_AT_8, "gamma_d"),
        Claim(
            5,
            "FC2 input at 8 bits: the weights take over (R = 1) at D/N of 50 to 400",
            "50 to 400",
            (50.0, 400.0),
            crossover(fc2_at_8=True),
            plain,
        ),
        Claim(
            5,
            "all inputs at 4 bits: R = 1 at D/N of 2,000 to 60,000",
            "2,000 to 60,000",
            (2000.0, 60000.0),
            crossover(fc2_at_8=False),
            plain,
        ),
    ]
