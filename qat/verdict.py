"""The arithmetic of the verdict: held-out losses in, deltas, R and one of four words out. Pure.

Input: losses[arm][k, i], the loss of held-out sequence i (nats per token) after training with seed
k. Every arm sees the same data in the same order for a seed and the same held-out sequences always,
so all differences are paired: d[a][k, i] = losses[a][k, i] - losses[bf16][k, i].

delta of an arm is the mean of its d. Two things make it uncertain, and both are counted:
    training    the seeds differ: covariance S over k of the seeds' deltas; half width q S^.5 / K^.5
                with q from Student's t at K - 1 degrees of freedom
    evaluation  the held-out text is finite: sequences that follow each other come from one text and
                are alike, so it is cut into B batches of neighbors: covariance E over the batches'
                mean differences; half width t E^.5 / B^.5 with B - 1 degrees of freedom
The seeds share the held-out text, so the second does not shrink with K. The half widths add in
quadrature. For two arms together that is the 2 x 2 matrix
    H = q(K)^2 S / K + t(B-1)^2 E / B
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

Looking after every seed and stopping at the first word would be wrong too often: chance has several
tries. So q is that of Looks: one level for all looks (Pocock, Biometrika 64, 1977) such that
Student's statistics of 3, 4, ... seeds stay within their quantiles all together with the asked
confidence. The intervals are repeated confidence intervals (Jennison and Turnbull, Group Sequential
Methods, 2000, chapter 9): they hold at all looks at once, so also at the one where it stopped. The
held-out text is one draw that all looks share, so its quantile stays.

What would settle an undetermined verdict is extrapolated from H at the same estimates: the cheapest
number of seeds and of held-out tokens with which the interval leaves the bound.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Word = Literal["converged", "activation-limited", "weight-limited", "undetermined"]

TOLERANCE = (0.8, 1.25)
CONFIDENCE = 0.95
FIRST_LOOK = 3
"""Seeds from which on a verdict may be settled before all of them are trained."""
MAX_BATCHES = 32
"""Of held-out text: more would be shorter, and neighbors more alike."""
MAX_SEEDS = 100
MAX_TEXT = 1024
"""Times the held-out text; no more of it, nor more seeds than MAX_SEEDS, is suggested."""


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
class Looks:
    """How sure an interval is to hold, and how often it was, or may be, looked at."""

    confidence: float = CONFIDENCE
    most: int | None = None
    """Seeds at the most, of a verdict that is looked at after each from FIRST_LOOK on; None: it is
    looked at once."""

    def seeds(self) -> range:
        """Return the numbers of seeds after which a sequential verdict is looked at."""
        assert self.most is not None
        return range(min(FIRST_LOOK, self.most), self.most + 1)

    def seed_quantile(self, seeds: int) -> float:
        """Return Student's two-sided quantile for a mean over seeds, at the level of every look."""
        if self.most is None:
            return _t(seeds, 1 - self.confidence)
        return _t(seeds, look_level(self.seeds()[0], self.most, 1 - self.confidence))

    def text_quantile(self, batches: int) -> float:
        """Return Student's two-sided quantile for a mean over batches of held-out text."""
        return _t(batches, 1 - self.confidence)


ONCE = Looks()
_PATHS = 50_000


@cache
def look_level(first: int, most: int, miss: float) -> float:
    """Return the level of each look at means of `first` to `most` normal values, simulated.

    At that level, Student's statistics leave their two-sided quantiles at any look with probability
    `miss`, to about 2 % of it. It lies between that and its share of the looks (Boole).
    """
    if first == most or most < 2:
        return miss
    counts = np.arange(max(first, 2), most + 1)
    values = np.random.default_rng(0).standard_normal((_PATHS, most))
    means = (values.cumsum(1) / np.arange(1, most + 1))[:, counts - 1]
    squares = (values**2).cumsum(1)[:, counts - 1]
    statistics = np.abs(means) / np.sqrt((squares / counts - means**2) / (counts - 1))
    low, high = miss / len(counts), miss
    for _ in range(16):
        level = math.sqrt(low * high)
        if (statistics > stats.t.ppf(1 - level / 2, counts - 1)).any(1).mean() > miss:
            high = level
        else:
            low = level
    return low


@dataclass(frozen=True)
class Spread:
    """The two covariances that make deltas uncertain, [arm, arm], and the counts behind them."""

    training: Floats | None
    """S, over seeds; None for one seed."""
    evaluation: Floats
    """E, over batches of held-out sequences, of the mean over seeds."""
    seeds: int
    batches: int

    def squared_half_widths(self, looks: Looks, *, seeds: int, text: int = 1) -> Floats:
        """Return H for so many seeds and times the held-out text, [arm, arm], squared nats."""
        half = looks.text_quantile(self.batches) ** 2 * self.evaluation / (self.batches * text)
        if self.training is not None:
            half = half + looks.seed_quantile(seeds) ** 2 * self.training / seeds
        return half


@dataclass(frozen=True)
class Needed:
    """What would settle an undetermined verdict: so many seeds on so many times the text."""

    seeds: int
    text: int


def _t(count: int, miss: float) -> float:
    """Student's two-sided quantile for the mean of `count` values; infinite for one value."""
    return float(stats.t.ppf(1 - miss / 2, count - 1)) if count > 1 else math.inf


def differences(losses: Mapping[str, Floats], baseline: str) -> dict[str, Floats]:
    """Return each arm's losses less the baseline's, [seed, sequence], paired."""
    return {arm: values - losses[baseline] for arm, values in losses.items()}


def spread(paired: list[Floats]) -> Spread:
    """Return the covariances of arms whose paired differences are [seed, sequence] each."""
    stacked = np.stack(paired)  # [arm, seed, sequence]
    _, seeds, sequences = stacked.shape
    training = np.atleast_2d(np.cov(stacked.mean(2))) if seeds > 1 else None
    batches = min(sequences, MAX_BATCHES)
    if batches > 1:
        pieces = np.array_split(stacked.mean(1), batches, axis=1)
        evaluation = np.atleast_2d(np.cov(np.stack([piece.mean(1) for piece in pieces], axis=1)))
    else:
        evaluation = np.full((len(paired), len(paired)), math.inf)
    return Spread(training, evaluation, seeds, batches)


def delta(paired: Floats, looks: Looks = ONCE) -> Interval:
    """Return an arm's delta from its paired differences [seed, sequence], nats per token."""
    if not paired.any():
        return Interval(0.0, 0.0, 0.0)  # the same training, as bf16 is to itself
    known = spread([paired])
    estimate = float(paired.mean())
    half = math.sqrt(known.squared_half_widths(looks, seeds=known.seeds)[0, 0])
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


def ratio(inputs: Floats, weights: Floats, looks: Looks = ONCE) -> Interval:
    """Return R from the paired differences of the two arms, [seed, sequence] each."""
    known = spread([weights, inputs])
    half = known.squared_half_widths(looks, seeds=known.seeds)
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


def needed(
    inputs: Floats,
    weights: Floats,
    looks: Looks = ONCE,
    *,
    training: float = 1.0,
    most_text: int = MAX_TEXT,
) -> Needed | None:
    """Return what would settle the verdict if the estimates and the spread stayed as they are.

    The cheapest of so many seeds, MAX_SEEDS at the most, on so many times the text, in powers of
    two up to `most_text`; `training` is the cost of training an arm, that of a pass over the
    present text being 1. None where nothing within the limits settles it: the estimate lies on a
    bound of the tolerance.
    """
    known = spread([weights, inputs])
    x, y = float(weights.mean()), float(inputs.mean())

    def settled(seeds: int, text: int) -> bool:
        then = looks if looks.most is None else replace(looks, most=seeds)
        half = known.squared_half_widths(then, seeds=seeds, text=text)
        return decide(fieller(x, y, half)) != "undetermined"

    def fewest(text: int) -> int:
        # H shrinks with every seed: from one number on, all settle.
        return numbers[bisect.bisect_left(numbers, True, key=lambda seeds: settled(seeds, text))]

    def cost(found: Needed) -> float:
        # On the present text, what is trained stays.
        new = found.seeds - known.seeds if found.text == 1 else found.seeds
        return new * (training + found.text)

    # With one seed nothing is known of the spread over seeds: more text is all that can be named.
    numbers = range(known.seeds, (max(MAX_SEEDS, known.seeds) if known.seeds > 1 else 1) + 1)
    texts = [1 << power for power in range(max(1, most_text).bit_length())]
    found = [Needed(fewest(text), text) for text in texts if settled(numbers[-1], text)]
    return min(found, key=cost, default=None)


def noise(
    losses: Mapping[str, Floats], baseline: str, looks: Looks = ONCE
) -> dict[str, float | None]:
    """Return the noise floor as these trainings measured it, nats per token.

    `bf16_seeds`: root mean square difference of the baseline's losses between two seeds, unpaired,
    as of trainings that share nothing but the recipe (None for one seed).
    `seed_std`: root mean square over arms of the standard deviation of delta over seeds (None for
    one seed). `evaluation_stderr`: the same of the standard error from the finite held-out text.
    `floor`: the widest half width of a delta; a difference between arms below it may be chance.
    """
    found: dict[str, float | None] = dict.fromkeys(
        ("bf16_seeds", "seed_std", "evaluation_stderr", "floor")
    )
    if baseline not in losses:
        return found
    by_seed = losses[baseline].mean(1)
    if len(by_seed) > 1:
        found["bf16_seeds"] = math.sqrt(2) * float(by_seed.std(ddof=1))
    moving = [values for values in differences(losses, baseline).values() if values.any()]
    if not moving:
        return found
    spreads = [spread([values]) for values in moving]
    seed = [float(s.training[0, 0]) for s in spreads if s.training is not None]
    text = [float(s.evaluation[0, 0]) / s.batches for s in spreads]
    intervals = [delta(values, looks) for values in moving]
    halves = [(i.high - i.low) / 2 for i in intervals if i.low is not None and i.high is not None]
    if seed:
        found["seed_std"] = math.sqrt(float(np.mean(seed)))
    if np.isfinite(text).all():
        found["evaluation_stderr"] = math.sqrt(float(np.mean(text)))
    if halves:
        found["floor"] = max(halves)
    return found
