"""`bitplan law design`: which further trainings narrow the law's intervals most, per hour.

Near a fit log delta is linear in its parameters,

    log delta = log k - gamma_N log N + gamma_D log D + gamma_G log log2 G

so a cell's information is that of its row x over its variance

    s^2 = 0.05^2 + (noise / delta)^2 / seeds

the scatter that law_fit.py allows and the noise of its seeds, and the parameters' covariance is the
inverse of the sum F of x x' / s^2. A training that gives a cell another seed, or a new cell its
first, adds w x x', and what that does is known in closed form: the variance of an exponent falls by
w (F^-1 x)_e^2 / (1 + w x' F^-1 x), and log det F, which counts all exponents, grows by
log(1 + w x' F^-1 x). Trainings are chosen one after another, each the one that does most for its
hours; those of the bf16 that it is compared with are among them where that is not trained yet.

The same order, begun from nothing, says how few of the cells at hand would have done. Widths are
those of this approximation, times what the bootstrap's are over it at hand.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bitplan.errors import BitplanError, FitError
from bitplan.qat import law_fit
from bitplan.qat.law_fit import RELATIVE_SCALE, Cells, Fit, Floats
from bitplan.qat.law_runs import deltas, read_trainings
from bitplan.qat.rates import expected_rate

EXPONENTS = ("gamma_n", "gamma_d", "gamma_g")
ALL = "all"
ENOUGH = 1.25
"""Intervals this many times as wide count as good enough."""
Z = 1.96
_RIDGE = 1e-9

Cell = tuple[float, float, float]
"""N, D, G."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One more training, and how wide the intervals are with it and all before it."""

    params: float
    tokens: float
    group_size: float
    seed: int
    """Its number in its cell, from 0."""
    with_bf16: bool
    """Whether the bf16 of its N, D and seed has to be trained beside it."""
    hours: float
    widths: Mapping[str, float]
    """Exponent to the width of its interval."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """What to train next, and how few trainings would have done."""

    precision: str
    exponent: str
    widths: Mapping[str, float]
    """Exponent to the width of its interval at hand."""
    steps: tuple[Step, ...]
    cells: int
    enough: int
    """Cells that give intervals at most ENOUGH times as wide."""
    enough_estimate: Mapping[str, float]
    """The law fitted to those alone."""
    estimate: Mapping[str, float]
    measured_rates: bool
    """Whether hours follow from measured tokens per second."""
    has_noise: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def as_text(self) -> str:
        """Return the trainings in order, the widths after each, and how few would have done."""
        head = "".join(f"{name:>10}" for name in EXPONENTS)
        now = "".join(f"{self.widths[name]:>10.4f}" for name in EXPONENTS)
        what = "all exponents" if self.exponent == ALL else self.exponent
        lines = [
            f"{self.precision}: trainings that narrow the interval of {what} most per hour",
            "",
            f"{'N':>10}{'D':>10}{'G':>6}{'seed':>6}{'hours':>9}{'in all':>9}   widths:{head}",
            f"{'at hand':>10}{'':40}   {'':7}{now}",
        ]
        total = 0.0
        for step in self.steps:
            total += step.hours
            after = "".join(f"{step.widths[name]:>10.4f}" for name in EXPONENTS)
            lines.append(
                f"{step.params:>10.3g}{step.tokens:>10.3g}{step.group_size:>6g}{step.seed:>6}"
                f"{step.hours:>9.3g}{total:>9.3g}{' + bf16' if step.with_bf16 else '':10}{after}"
            )
        lines += [
            "",
            "Hours of one worker, at the tokens per second measured for the nearest N."
            if self.measured_rates
            else "Hours of one GPU at the rate given: no tokens per second are on record.",
        ]
        if not self.has_noise:
            lines.append("No cell has several seeds, so the noise is unknown and taken as none.")
        fewer = ", ".join(
            f"{name} {self.enough_estimate[name]:.3f} ({self.estimate[name]:.3f} of all)"
            for name in EXPONENTS
        )
        lines.append(
            f"{self.enough} of the {self.cells} cells would have given intervals at most {ENOUGH} "
            f"times as wide: {fewer}"
        )
        return "\n".join(lines)


def design_law(
    paths: Sequence[Path],
    *,
    precision: str | None = None,
    exponent: str = ALL,
    steps: int = 10,
    params: Sequence[float] = (),
    tokens: Sequence[float] = (),
    groups: Sequence[float] = (),
    flops_per_second: float,
    schedule: str | None = None,
    force: bool = False,
    branched: bool | None = None,
    bootstraps: int = law_fit.BOOTSTRAPS,
) -> Design:
    """Return what to train next for a law of the trainings of `paths`.

    precision: None: the first that they have. params, tokens, groups: the values to choose from;
    by default those at hand and, of N and D, one step beyond at both ends. Raises FitError where
    the law cannot be fitted to what is there, and what read_trainings raises.
    """
    if exponent not in (ALL, *EXPONENTS):
        raise BitplanError(f"no exponent {exponent!r}: there are {', '.join((ALL, *EXPONENTS))}")
    trainings, _ = read_trainings(paths, schedule=schedule, force=force, branched=branched)
    differences = deltas(trainings)
    names: list[str] = differences["precision"].unique(maintain_order=True).to_list()
    chosen = precision or next(iter(names), "any precision")
    if chosen not in names:
        raise FitError(
            f"no training of {chosen} with its bf16: there are {', '.join(names) or 'none'}"
        )
    cells = law_fit.cells_of(differences.filter(precision=chosen))
    fit = law_fit.fit(cells, bootstraps=bootstraps)
    hours, measured = _hours(trainings, flops_per_second)
    model = _Model(cells, fit)
    bf16 = trainings.filter(precision="bf16").group_by("params", "tokens").len()
    return Design(
        precision=chosen,
        exponent=exponent,
        widths=model.widths(model.information),
        steps=tuple(
            model.further(
                params or beyond(cells.params),
                tokens or beyond(cells.tokens),
                groups or sorted(set(cells.group_size.tolist())),
                {(float(n), float(d)): count for n, d, count in bf16.iter_rows()},
                hours,
                exponent,
                steps,
            )
        ),
        cells=len(cells.delta),
        enough=len(few := model.few(exponent)),
        enough_estimate=law_fit.fit(cells.take(few), bootstraps=0).estimate,
        estimate=fit.estimate,
        measured_rates=measured,
        has_noise=bool(cells.stderr.max() > 0),
    )


def beyond(values: Floats) -> list[float]:
    """Return the different values, and one more at each end by their median ratio."""
    found = np.unique(values)
    ratio = float(np.median(found[1:] / found[:-1]))
    return [float(found[0] / ratio), *found.tolist(), float(found[-1] * ratio)]


def _hours(
    trainings: pl.DataFrame, flops_per_second: float
) -> tuple[Callable[[float, float], float], bool]:
    """Return a training's hours by N and D, and whether they follow from measured rates.

    An arm that branches from a trunk costs its own tokens; the trunk serves all of its points.
    """
    arms = (trainings["tokens"] - trainings["trunk_tokens"]).drop_nulls().median()

    def own(tokens: float) -> float:
        return tokens if arms is None else float(arms)  # type: ignore[arg-type]  # a number

    known = trainings.filter(pl.col("tokens_per_second").is_not_null())
    rates: dict[int, list[float]] = {}
    for n, rate in known.select("params", "tokens_per_second").iter_rows():
        rates.setdefault(n, []).append(rate)
    if not rates:
        return lambda n, d: 6 * n * own(d) / flops_per_second / 3600, False
    return lambda n, d: own(d) / expected_rate(rates, n) / 3600, True


class _Model:
    """The linearized law at a fit: information of cells, and what more of them would add."""

    def __init__(self, cells: Cells, fit: Fit) -> None:
        self.cells = cells
        self.estimate = fit.estimate
        counts = np.array([len(seeds) for seeds in cells.seeds])
        self.noise = float(np.max(cells.stderr * np.sqrt(counts)))
        self.seeds: Counter[Cell] = Counter()
        for cell, count in zip(_list(cells), counts, strict=True):
            self.seeds[cell] += int(count)
        raw = _raw(*(getattr(cells, name) for name in ("params", "tokens", "group_size")))
        self.center = np.r_[0.0, raw[:, 1:].mean(0)]
        weights = [self.weight(cell, 0, count) for cell, count in self.seeds.items()]
        rows = np.stack([self.row(cell) for cell in self.seeds])
        self.information: Floats = (rows.T * weights) @ rows
        self.calibration = dict.fromkeys(EXPONENTS, 1.0)
        linear = self.widths(self.information)
        if not math.isnan(fit.low["gamma_n"]):
            self.calibration = {
                name: (fit.high[name] - fit.low[name]) / linear[name] for name in EXPONENTS
            }

    def row(self, cell: Cell) -> Floats:
        """Return x, centered: only the variance of k depends on the center."""
        return np.asarray(_raw(*(np.array([v]) for v in cell))[0] - self.center)

    def variance(self, cell: Cell, seeds: int) -> float:
        """Return s^2 of a cell's log delta with so many seeds."""
        e = self.estimate
        delta = e["k"] * cell[1] ** e["gamma_d"] * math.log2(cell[2]) ** e["gamma_g"]
        delta /= cell[0] ** e["gamma_n"]
        return float(RELATIVE_SCALE**2 + (self.noise / delta) ** 2 / seeds)

    def weight(self, cell: Cell, before: int, after: int) -> float:
        """Return w, the information that a cell gains as its seeds grow."""
        had = 1 / self.variance(cell, before) if before else 0.0
        return 1 / self.variance(cell, after) - had

    def widths(self, information: Floats) -> dict[str, float]:
        """Return the width of each exponent's interval."""
        covariance = _inverse(information)
        return {
            name: 2 * Z * float(np.sqrt(covariance[i + 1, i + 1])) * self.calibration[name]
            for i, name in enumerate(EXPONENTS)
        }

    def further(
        self,
        params: Sequence[float],
        tokens: Sequence[float],
        groups: Sequence[float],
        bf16: Mapping[tuple[float, float], int],
        hours: Callable[[float, float], float],
        exponent: str,
        steps: int,
    ) -> list[Step]:
        """Return the trainings to add, one after another, each the best for its hours."""
        candidates = [
            (float(n), float(d), float(g)) for n in params for d in tokens for g in groups
        ]
        seeds, baselines = Counter(self.seeds), Counter(dict(bf16))
        information, found = self.information, []
        for _ in range(steps):
            covariance = _inverse(information)

            def value(cell: Cell, covariance: Floats = covariance) -> float:
                weight = self.weight(cell, seeds[cell], seeds[cell] + 1)
                return gain(covariance, self.row(cell), weight, exponent) / cost(cell)

            def cost(cell: Cell) -> float:
                fresh = baselines[cell[:2]] <= seeds[cell]
                return hours(cell[0], cell[1]) * (2 if fresh else 1)

            best = max(candidates, key=value)
            seed, spent, x = seeds[best], cost(best), self.row(best)
            fresh = baselines[best[:2]] <= seed
            information = information + self.weight(best, seed, seed + 1) * np.outer(x, x)
            seeds[best] += 1
            baselines[best[:2]] = max(baselines[best[:2]], seed + 1)
            found.append(
                Step(
                    params=best[0],
                    tokens=best[1],
                    group_size=best[2],
                    seed=seed,
                    with_bf16=fresh,
                    hours=spent,
                    widths=self.widths(information),
                )
            )
        return found

    def few(self, exponent: str) -> "np.typing.NDArray[np.int64]":
        """Return the fewest cells at hand, chosen in order, whose widths are ENOUGH."""
        names = EXPONENTS if exponent == ALL else (exponent,)
        wanted = {name: ENOUGH * self.widths(self.information)[name] for name in names}
        rows = [self.row(cell) for cell in _list(self.cells)]
        weights = [self.weight(cell, 0, self.seeds[cell]) for cell in _list(self.cells)]
        information, left = _RIDGE * np.eye(len(self.center)), set(range(len(rows)))
        needed, taken = len(self.center) + law_fit.SPARE_CELLS, list[int]()
        while left:
            covariance = _inverse(information)
            # From nothing an exponent alone would take cells of one kind, so all count at first.
            goal = ALL if len(taken) < needed else exponent
            scores = {i: gain(covariance, rows[i], weights[i], goal) for i in sorted(left)}
            best = max(scores, key=lambda i: scores[i])
            left.remove(best)
            taken.append(best)
            information = information + weights[best] * np.outer(rows[best], rows[best])
            if len(taken) < needed:
                continue
            reached = self.widths(information)
            if all(reached[name] <= wanted[name] for name in names):
                break
        return np.array(sorted(taken))


def gain(covariance: Floats, x: Floats, weight: float, exponent: str) -> float:
    """Return what `weight` times x x' adds: to log det F, or off an exponent's variance."""
    moved = covariance @ x
    grown = 1 + weight * float(x @ moved)
    if exponent == ALL:
        return math.log(grown)
    return weight * float(moved[EXPONENTS.index(exponent) + 1]) ** 2 / grown


def _inverse(information: Floats) -> Floats:
    return np.asarray(np.linalg.inv(information), dtype=np.float64)


def _list(cells: Cells) -> list[Cell]:
    columns = (cells.params, cells.tokens, cells.group_size)
    return [(float(n), float(d), float(g)) for n, d, g in zip(*columns, strict=True)]


def _raw(params: Floats, tokens: Floats, groups: Floats) -> Floats:
    """Return rows (1, -log N, log D, log log2 G), [C, 4]."""
    ones = np.ones_like(params)
    return np.stack([ones, -np.log(params), np.log(tokens), np.log(np.log2(groups))], axis=1)
