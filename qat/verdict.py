"""The arithmetic of the verdict: held-out losses in, deltas, R and one of four words out. Pure.

Input: losses[arm][k, i], the loss of held-out sequence i (nats per token) after training with seed
k. Every arm sees the same data in the same order for a seed and the same held-out sequences always,
so all differences are paired: d[a][k, i] = losses[a][k, i] - losses[bf16][k, i].

delta of an arm is the mean of its d. Two things make it uncertain, and both are counted:
    training    the seeds differ: covariance S over k of the seeds' deltas; half width t S^.5 / K^.5
                with Student's t at K - 1 degrees of freedom
    evaluation  the held-out text is finite: covariance E over i of the sequences' mean differences;
                half width t E^.5 / n^.5 with n - 1 degrees of freedom
The seeds share the held-out text, so the second does not shrink with K. The half widths add in
quadrature. For two arms together that is the 2 x 2 matrix
    H = t(K-1)^2 S / K + t(n-1)^2 E / n
whose diagonal holds the squared half widths of both deltas. With one seed, S is not known, the
interval is that of the evaluation alone, and the result says so.

R = y / x, delta of the inputs over delta of the weights. Its interval is Fieller's (1954): all r
with (y - r x)^2 <= H_yy - 2 r H_xy + r^2 H_xx. It is bounded where x is separated from zero
(x^2 > H_xx); where x is not, or is negative, R has no bounds and they are null.

The verdict, with the interval [low, high] of R after the plan and the tolerance [0.8, 1.25]:
    converged           0.8 <= low and high <= 1.25
    activation-limited  low > 1.25
    weight-limited      high < 0.8
    undetermined        anything else: the interval contains a bound of the tolerance
So the first three exclude each other, and more data moves the answer out of undetermined only.
What would settle it is extrapolated from H: the number of seeds, at the same estimates, from which
on the interval leaves the bound; or, where no number of seeds does, of held-out tokens as well.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Word = Literal["converged", "activation-limited", "weight-limited", "undetermined"]

TOLERANCE = (0.8, 1.25)
CONFIDENCE = 0.95
MAX_SEEDS = 100
MAX_TEXT = 1024
"""Times the held-out text; no more of it, nor more seeds than MAX_SEEDS, is ever suggested."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; bounds are None where it has none."""

    estimate: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.estimate is None:
            return "unknown"
        if self.low is None or self.high is None:
            return f"{self.estimate:.2f} [no bounds]"
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Spread:
    """The two covariances that make deltas uncertain, [arm, arm], and the counts behind them."""

    training: Floats | None
    """S, over seeds; None for one seed."""
    evaluation: Floats
    """E, over held-out sequences, of the mean over seeds."""
    seeds: int
    sequences: int

    def squared_half_widths(self, *, seeds: int, sequences: int) -> Floats:
        """Return H for so many seeds and held-out sequences, [arm, arm], squared nats."""
        half = _t(sequences) ** 2 * self.evaluation / sequences
        if self.training is not None:
            half = half + _t(seeds) ** 2 * self.training / seeds
        return half


@dataclass(frozen=True)
class Needed:
    """What would settle an undetermined verdict: so many seeds on so many held-out sequences."""

    seeds: int
    sequences: int


def _t(count: int) -> float:
    """Student's two-sided quantile for the mean of `count` values; infinite for one value."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) if count > 1 else math.inf


def differences(losses: Mapping[str, Floats], baseline: str) -> dict[str, Floats]:
    """Return each arm's losses less the baseline's, [seed, sequence], paired."""
    return {arm: values - losses[baseline] for arm, values in losses.items()}


def spread(paired: list[Floats]) -> Spread:
    """Return the covariances of arms whose paired differences are [seed, sequence] each."""
    stacked = np.stack(paired)  # [arm, seed, sequence]
    _, seeds, sequences = stacked.shape
    training = np.atleast_2d(np.cov(stacked.mean(2))) if seeds > 1 else None
    if sequences > 1:
        evaluation = np.atleast_2d(np.cov(stacked.mean(1)))
    else:
        evaluation = np.full((len(paired), len(paired)), math.inf)
    return Spread(training, evaluation, seeds, sequences)


def delta(paired: Floats) -> Interval:
    """Return an arm's delta from its paired differences [seed, sequence], nats per token."""
    if not paired.any():
        return Interval(0.0, 0.0, 0.0)  # the same training, as bf16 is to itself
    known = spread([paired])
    estimate = float(paired.mean())
    half = math.sqrt(known.squared_half_widths(seeds=known.seeds, sequences=known.sequences)[0, 0])
    if not math.isfinite(half):
        return Interval(estimate, None, None)
    return Interval(estimate, estimate - half, estimate + half)


def fieller(x: float, y: float, half: Floats) -> Interval:
    """Return y / x with Fieller's interval; `half` is H in the order (x, y)."""
    estimate = y / x if x else None
    a = x * x - half[0, 0]
    if not math.isfinite(a) or a <= 0 or x <= 0:
        return Interval(estimate, None, None)
    b = x * y - half[0, 1]
    c = y * y - half[1, 1]
    # b^2 >= a c whenever a > 0, as r = y / x is in the set; rounding may say otherwise.
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(estimate, (b - root) / a, (b + root) / a)


def ratio(inputs: Floats, weights: Floats) -> Interval:
    """Return R from the paired differences of the two arms, [seed, sequence] each."""
    known = spread([weights, inputs])
    half = known.squared_half_widths(seeds=known.seeds, sequences=known.sequences)
    return fieller(float(weights.mean()), float(inputs.mean()), half)


def decide(interval: Interval) -> Word:
    """Return the word for an interval of R."""
    low, high = interval.low, interval.high
    if low is None or high is None:
        return "undetermined"
    if low >= TOLERANCE[0] and high <= TOLERANCE[1]:
        return "converged"
    if low > TOLERANCE[1]:
        return "activation-limited"
    return "weight-limited" if high < TOLERANCE[0] else "undetermined"


def needed(inputs: Floats, weights: Floats) -> Needed | None:
    """Return what would settle the verdict if the estimates and the spread stayed as they are.

    The fewest seeds on the same text; else the least text, in powers of two, with MAX_SEEDS at the
    most. None where nothing within the limits does: the estimate lies on a bound of the tolerance.
    """
    known = spread([weights, inputs])
    x, y = float(weights.mean()), float(inputs.mean())

    def settled(seeds: int, sequences: int) -> bool:
        half = known.squared_half_widths(seeds=seeds, sequences=sequences)
        return decide(fieller(x, y, half)) != "undetermined"

    # With one seed nothing is known of the spread over seeds: more text is all that can be named.
    most = max(MAX_SEEDS, known.seeds) if known.seeds > 1 else 1
    sequences = known.sequences
    while sequences <= MAX_TEXT * known.sequences:
        if settled(most, sequences):
            seeds = next(n for n in range(known.seeds, most + 1) if settled(n, sequences))
            return Needed(seeds, sequences)
        sequences *= 2
    return None


def noise(paired: Mapping[str, Floats]) -> dict[str, float | None]:
    """Return the noise floor of the arms' deltas, nats per token.

    `seed_std`: root mean square over arms of the standard deviation over seeds (None for one seed).
    `evaluation_stderr`: the same of the standard error from the finite held-out text. `floor`: the
    widest half width; a difference between arms below it may be chance.
    """
    moving = [values for values in paired.values() if values.any()]
    if not moving:
        return {"seed_std": None, "evaluation_stderr": None, "floor": None}
    spreads = [spread([values]) for values in moving]
    seed = [float(s.training[0, 0]) for s in spreads if s.training is not None]
    text = [float(s.evaluation[0, 0]) / s.sequences for s in spreads]
    halves = [
        interval.high - interval.estimate
        for interval in map(delta, moving)
        if interval.high is not None and interval.estimate is not None
    ]
    return {
        "seed_std": math.sqrt(float(np.mean(seed))) if seed else None,
        "evaluation_stderr": math.sqrt(float(np.mean(text))) if np.isfinite(text).all() else None,
        "floor": max(halves) if halves else None,
    }
