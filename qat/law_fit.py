"""Fit the scaling law: deltas of trainings in, constants with intervals out. Pure.

A *cell* is one (N, D, G); its delta is the mean over seeds. A form gives delta from (N, D, G) and
its parameters; the law's own (arXiv 2505.14302) is

    delta = k D^gamma_D (log2 G)^gamma_G / N^gamma_N

and beside it stand what leaves out D or G, N alone (the older form, in which a precision is worth a
fixed share of the parameters), G to a power, and a sum in the place of the product. The fit
minimizes Huber's loss of (delta - predicted) / scale over several starts, where a cell's scale is
5 % of its delta and its noise in quadrature: nearly a fit of log delta where deltas are far from
the noise, and one that keeps deltas below zero with their noise where they are not. The noise of a
cell is the standard deviation over seeds, pooled over the cells that have several.

Intervals are of a bootstrap over (N, D), whose cells share their bf16 and so its noise, and within
each over seeds, the same for all its cells. Fits of several precisions to the same `pairs` are of
the same draws, number by number, so that constants of two of them can be compared. What the data
cannot carry is refused with what is missing: a variable of a single value, fewer cells than
parameters ask for, or deltas of which most are not above twice their noise.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import least_squares

from bitplan.errors import FitError
from bitplan.law import Baseline

Floats = NDArray[np.float64]

RELATIVE_SCALE = 0.05
SPARE_CELLS = 2
"""Cells that a fit needs beyond its parameters."""
BOOTSTRAPS = 200
FOLDS = 10
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cells:
    """Deltas of one precision by cell, nats per token; [C] each, `seeds` the deltas of each."""

    params: Floats
    tokens: Floats
    group_size: Floats
    delta: Floats
    stderr: Floats
    seeds: tuple[Floats, ...]

    def take(self, index: NDArray[np.int64]) -> "Cells":
        """Return the cells at these indices."""
        return Cells(
            params=self.params[index],
            tokens=self.tokens[index],
            group_size=self.group_size[index],
            delta=self.delta[index],
            stderr=self.stderr[index],
            seeds=tuple(self.seeds[i] for i in index),
        )


@dataclass(frozen=True)
class Form:
    """A form of the law: what its parameters are, what it varies with, and delta from them.

    `predict` takes parameters [P] and the logarithms of N, D and of log2 G and G, each less its
    mean over the cells, [C]; it returns log delta.
    """

    name: str
    parameters: tuple[str, ...]
    variables: tuple[str, ...]
    predict: Callable[[Floats, Mapping[str, Floats]], Floats]


def _product(*terms: str) -> Callable[[Floats, Mapping[str, Floats]], Floats]:
    def predict(p: Floats, x: Mapping[str, Floats]) -> Floats:
        return np.asarray(p[0] + sum(p[i + 1] * x[term] for i, term in enumerate(terms)))

    return predict


def _sum(p: Floats, x: Mapping[str, Floats]) -> Floats:
    scaling, groups = p[0] + p[1] * x["N"] + p[2] * x["D"], p[3] + p[4] * x["log2 G"]
    return np.asarray(np.logaddexp(scaling, groups))


LAW = Form(
    "k D^d (log2 G)^g / N^n",
    ("k", "gamma_n", "gamma_d", "gamma_g"),
    ("params", "tokens", "group_size"),
    _product("N", "D", "log2 G"),
)
FORMS = (
    LAW,
    Form(
        "without D", ("k", "gamma_n", "gamma_g"), ("params", "group_size"), _product("N", "log2 G")
    ),
    Form("without G", ("k", "gamma_n", "gamma_d"), ("params", "tokens"), _product("N", "D")),
    Form("k / N^n", ("k", "gamma_n"), ("params",), _product("N")),
    Form(
        "k D^d G^g / N^n",
        ("k", "gamma_n", "gamma_d", "gamma_g"),
        ("params", "tokens", "group_size"),
        _product("N", "D", "G"),
    ),
    Form(
        "k D^d / N^n + c (log2 G)^g",
        ("k", "gamma_n", "gamma_d", "c", "gamma_g"),
        ("params", "tokens", "group_size"),
        _sum,
    ),
)


@dataclass(frozen=True)
class Fit:
    """A fitted form: estimates and intervals by parameter, and how well it describes the cells."""

    estimate: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]
    predicted: Floats
    """[C]"""
    relative_error: float
    """As `relative_error` says."""
    cells: int
    drawn: Mapping[int, Mapping[str, float]]
    """Number of a bootstrap draw to the constants of its fit."""

    def interval(self, name: str) -> tuple[float, float, float]:
        """Return a constant's estimate, and the bounds of its interval."""
        return self.estimate[name], self.low[name], self.high[name]


def cells_of(deltas: pl.DataFrame) -> Cells:
    """Return the cells of one precision from law_runs.deltas; what has no bf16 is left out."""
    key = ["params", "tokens", "group_size"]
    grouped = (
        deltas.filter(pl.col("delta").is_not_null())
        .group_by(key, maintain_order=True)
        .agg(pl.col("delta").sort_by("seed"))
    )
    seeds = tuple(np.array(values) for values in grouped["delta"].to_list())
    several = [s for s in seeds if len(s) > 1]
    freedom = sum(len(s) - 1 for s in several)
    pooled = (
        np.sqrt(sum(((s - s.mean()) ** 2).sum() for s in several) / freedom) if freedom else 0.0
    )
    params, tokens, group_size = (grouped[name].cast(pl.Float64).to_numpy() for name in key)
    return Cells(
        params=params,
        tokens=tokens,
        group_size=group_size,
        delta=np.array([s.mean() for s in seeds]),
        stderr=np.array([pooled / np.sqrt(len(s)) for s in seeds]),
        seeds=seeds,
    )


def check(cells: Cells, form: Form) -> None:
    """Raise FitError where the cells cannot carry the form, with what is missing."""
    lacks = []
    for name in form.variables:
        if (found := len(np.unique(getattr(cells, name)))) < 2:
            lacks.append(f"at least 2 values of {name.replace('_', ' ')} (found {found})")
    needed = len(form.parameters) + SPARE_CELLS
    if len(cells.delta) < needed:
        lacks.append(f"at least {needed} cells of (N, D, G) (found {len(cells.delta)})")
    above = int((cells.delta > 2 * cells.stderr).sum())
    if not lacks and above * 2 < len(cells.delta):
        lacks.append(
            f"deltas above their noise (only {above} of {len(cells.delta)} exceed twice it): more "
            "seeds, or smaller models"
        )
    if lacks:
        raise FitError(f"the trainings cannot carry the fit: it needs {'; '.join(lacks)}")


def pairs_of(cells: Sequence[Cells]) -> Floats:
    """Return the different (N, D) that any of the precisions has, [pair, 2]."""
    found = [np.stack([c.params, c.tokens], axis=1) for c in cells]
    return np.asarray(np.unique(np.concatenate(found), axis=0))


def fit(
    cells: Cells,
    form: Form = LAW,
    *,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
    pairs: Floats | None = None,
) -> Fit:
    """Return the form fitted to the cells; raise FitError where they cannot carry it.

    pairs: the (N, D) that draws are of, from `pairs_of`; by default those of the cells.
    """
    check(cells, form)
    x, means = _logs(cells)
    theta = _minimize(form, cells, x, _starts(form, cells))
    pairs = pairs_of([cells]) if pairs is None else pairs
    drawn: dict[int, dict[str, float]] = {}
    for number in itertools.count():
        if len(drawn) == bootstraps:
            break
        sample = _resample(cells, pairs, (seed, number))
        if any(len(np.unique(getattr(sample, name))) < 2 for name in form.variables):
            continue
        drawn[number] = _constants(
            form, _minimize(form, sample, _centered(sample, means), [theta]), means
        )
    estimate = _constants(form, theta, means)
    bounds = {
        name: quantiles([d[name] for d in drawn.values()]) if drawn else (np.nan, np.nan)
        for name in form.parameters
    }
    predicted = np.exp(form.predict(theta, x))
    return Fit(
        estimate=estimate,
        low={name: float(b[0]) for name, b in bounds.items()},
        high={name: float(b[1]) for name, b in bounds.items()},
        predicted=predicted,
        relative_error=relative_error(predicted, cells.delta),
        cells=len(cells.delta),
        drawn=drawn,
    )


def quantiles(drawn: Sequence[float]) -> tuple[float, float]:
    """Return the bounds between which CONFIDENCE of the bootstrap's values lie."""
    tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    if np.isfinite(drawn).all():
        low, high = np.quantile(drawn, tails)
    else:  # between values that overflowed there is no mean: one of them is the bound
        low, high = np.quantile(drawn, tails, method="closest_observation")
    return float(low), float(high)


def relative_error(predicted: Floats, delta: Floats) -> float:
    """Return the sum of |predicted - delta| over that of |delta|.

    A mean of the cells' own relative errors would be that of the few whose delta is next to zero.
    """
    return float(np.abs(predicted - delta).sum() / np.abs(delta).sum())


def cross_validate(cells: Cells, form: Form, *, seed: int = 0) -> float:
    """Return the relative error on cells that were left out of the fit, in FOLDS folds."""
    check(cells, form)
    order = np.random.default_rng(seed).permutation(len(cells.delta))
    predicted = np.empty_like(cells.delta)
    _, means = _logs(cells)
    for fold in np.array_split(order, min(FOLDS, len(order))):
        kept = cells.take(np.setdiff1d(order, fold))
        theta = _minimize(form, kept, _centered(kept, means), _starts(form, kept))
        predicted[fold] = np.exp(form.predict(theta, _centered(cells.take(fold), means)))
    return relative_error(predicted, cells.delta)


def additivity(
    both: Cells, weights: Cells, inputs: Cells, *, bootstraps: int = BOOTSTRAPS, seed: int = 0
) -> tuple[float, float, float]:
    """Return the factor c of delta_both = c (delta_weights + delta_inputs), and its interval.

    Over the cells that all three have, drawn by (N, D); raises FitError where there is none.
    """
    tables = [
        dict(zip(zip(c.params, c.tokens, c.group_size, strict=True), c.delta, strict=True))
        for c in (both, weights, inputs)
    ]
    common = [cell for cell in tables[0] if cell in tables[1] and cell in tables[2]]
    if not common:
        raise FitError("no cell has w4a4, w4a16 and w16a4: their sum cannot be compared")
    y = np.array([tables[0][cell] for cell in common])
    x = np.array([tables[1][cell] + tables[2][cell] for cell in common])
    pairs, of = np.unique(np.array(common)[:, :2], axis=0, return_inverse=True)
    # The slope's two sums, of each pair: [pair]
    top, bottom = (np.bincount(of.ravel(), weights=values) for values in (x * y, x * x))
    drawn = np.random.default_rng(seed).integers(len(pairs), size=(bootstraps, len(pairs)))
    low, high = quantiles((top[drawn].sum(1) / bottom[drawn].sum(1)).tolist())
    return float(top.sum() / bottom.sum()), low, high


def fit_baseline(params: Floats, tokens: Floats, loss: Floats) -> Baseline:
    """Return A, B, E and one exponent for both (as in the paper) from the losses of bf16, [C].

    Raises FitError with fewer than 3 values of N or of D.
    """
    for name, values in (("params", params), ("tokens", tokens)):
        if (found := len(np.unique(values))) < 3:
            raise FitError(f"the loss of bf16 needs at least 3 values of {name} (found {found})")

    def predict(theta: Floats) -> Floats:
        a, b, e, alpha = theta
        return np.asarray(
            np.exp(a - alpha * np.log(params)) + np.exp(b - alpha * np.log(tokens)) + np.exp(e)
        )

    def residual(theta: Floats) -> Floats:
        return np.asarray(np.log(predict(theta)) - np.log(loss))

    third = np.log(0.3 * loss.mean())
    n, d = np.log(params.mean()), np.log(tokens.mean())
    starts = [
        [third + alpha * n, third + alpha * d, np.log(share * loss.min()), alpha]
        for alpha in (0.2, 0.3, 0.5)
        for share in (0.4, 0.8)
    ]
    fits = [least_squares(residual, start, loss="huber", f_scale=1e-3) for start in starts]
    a, b, e, alpha = min(fits, key=lambda found: found.cost).x
    return Baseline(
        a=float(np.exp(a)), b=float(np.exp(b)), e=float(np.exp(e)), alpha=alpha, beta=alpha
    )


def _logs(cells: Cells) -> tuple[dict[str, Floats], dict[str, float]]:
    raw = _raw_logs(cells)
    means = {name: float(values.mean()) for name, values in raw.items()}
    return {name: values - means[name] for name, values in raw.items()}, means


def _centered(cells: Cells, means: Mapping[str, float]) -> dict[str, Floats]:
    return {name: values - means[name] for name, values in _raw_logs(cells).items()}


def _raw_logs(cells: Cells) -> dict[str, Floats]:
    return {
        "N": np.log(cells.params),
        "D": np.log(cells.tokens),
        "log2 G": np.log(np.log2(cells.group_size)),
        "G": np.log(cells.group_size),
    }


def _starts(form: Form, cells: Cells) -> list[Floats]:
    """Return where the minimization starts: small and larger exponents around the mean delta."""
    level = np.log(max(float(np.median(cells.delta)), 1e-6))
    scales = [level if name in ("k", "c") else np.nan for name in form.parameters]
    signs = [-1.0 if name == "gamma_n" else 1.0 for name in form.parameters]
    return [
        np.array([s * size if np.isnan(v) else v for v, s in zip(scales, signs, strict=True)])
        for size in (0.05, 0.3, 0.8)
    ]


def _minimize(form: Form, cells: Cells, x: Mapping[str, Floats], starts: list[Floats]) -> Floats:
    floor = max(float(np.abs(cells.delta).max()) * 1e-3, 1e-9)
    scale = np.hypot(cells.stderr, RELATIVE_SCALE * np.maximum(cells.delta, floor))

    def residual(theta: Floats) -> Floats:
        predicted = np.exp(np.minimum(form.predict(theta, x), 50.0))
        return np.asarray((predicted - cells.delta) / scale)

    fits = [least_squares(residual, start, loss="huber") for start in starts]
    best: Floats = min(fits, key=lambda found: found.cost).x
    return best


def _constants(form: Form, theta: Floats, means: Mapping[str, float]) -> dict[str, float]:
    """Return the parameters in the law's own units: k at N = D = 1, gamma_n counted downwards."""
    found = dict(zip(form.parameters, theta.tolist(), strict=True))
    group = "G" if "G^g" in form.name and "log2" not in form.name else "log2 G"
    of = {"gamma_n": "N", "gamma_d": "D", "gamma_g": group}
    own = {"c": ("gamma_g",)} if "c" in found else {}
    shared = tuple(name for name in of if name in found and name not in own.get("c", ()))
    for scale, exponents in (("k", shared), *own.items()):
        found[scale] -= sum(found[name] * means[of[name]] for name in exponents)
        with np.errstate(over="ignore"):  # a draw may be absurd, and its k infinite
            found[scale] = float(np.exp(found[scale]))
    if "gamma_n" in found:
        found["gamma_n"] = -found["gamma_n"]
    return found


def _resample(cells: Cells, pairs: Floats, number: tuple[int, int]) -> Cells:
    """Draw pairs (N, D) with replacement, each with all its cells, and within each its seeds.

    What is drawn follows from `number` and `pairs` alone; cells that have no such pair lack it.
    """
    chosen = pairs[np.random.default_rng(number).integers(len(pairs), size=len(pairs))]
    most = max(map(len, cells.seeds))
    index: list[int] = []
    delta: list[float] = []
    for place, (params, tokens) in enumerate(chosen):
        share = np.random.default_rng((*number, place)).random(most)
        for i in np.flatnonzero((cells.params == params) & (cells.tokens == tokens)):
            seeds = cells.seeds[i]
            index.append(int(i))
            delta.append(float(seeds[(share[: len(seeds)] * len(seeds)).astype(int)].mean()))
    return replace(cells.take(np.array(index, dtype=np.int64)), delta=np.array(delta))
