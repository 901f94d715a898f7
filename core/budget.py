"""`bitplan law budget`: which precision ends lowest, for a training's compute or a model's bytes.

    compute   C = 6 N D floating-point operations, embeddings and attention scores left out; N is
              given, or chosen for each precision so that L(N, C / 6N, G) is smallest. L is a sum of
              powers of N with N falling and rising, so convex in log N: the minimum is the one.
    serving   N is what B bytes hold at a precision's effective bits (4 + 16/G, 8 + 16/G), D given.
              Inputs are not stored: 8 bits at the inputs of FC2 cost time and no bytes.

8 bits are taken as lossless (delta 0), as the paper takes them: the law has no row for them. A
model's effective parameters are N times its effective parameter multiplier, which is what the
unquantized model of that loss has. So 4 bits pay where, from the same bytes, they leave more of
them than 8 bits do.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bitplan.errors import BitplanError
from bitplan.forecast import check_values
from bitplan.formats import parse_format
from bitplan.law import FC2_AT_8, PAPER, LawSet

FLOPS_PER_TOKEN = 6.0
"""Times N: two for a multiplication forward, four for the two backward."""

LOSSLESS = "w8a8"


@dataclass(frozen=True)
class Choice:
    """A precision that budgets compare: its name in words, and the bits of its weights."""

    precision: str
    words: str
    weight_bits: int


CHOICES = (
    Choice("w4a4", "4 bits", 4),
    Choice("w4a4" + FC2_AT_8, "4 bits, FC2 inputs at 8", 4),
    Choice("w4a16", "4-bit weights alone", 4),
    Choice(LOSSLESS, "8 bits, taken as lossless", 8),
)

NEEDS = tuple(c.precision for c in CHOICES if c.precision != LOSSLESS)
FEWEST_BITS = min(c.weight_bits for c in CHOICES)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a budget buys under each precision, the lowest loss first."""

    budget: str
    group_size: float
    rows: tuple[dict[str, Any], ...]
    source: str

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def as_text(self) -> str:
        """Return a row per precision, the lowest loss first."""
        lines = [
            f"{self.budget}; G {self.group_size:g}; law of {self.source}",
            "",
            f"{'precision':26}{'N':>11}{'D':>11}{'GB':>9}{'delta':>9}{'final loss':>12}"
            f"{'effective N':>13}{'worth':>8}",
        ]
        for row in self.rows:
            lines.append(
                f"{row['words']:26}{row['params']:>11.3g}{row['tokens']:>11.3g}"
                f"{row['bytes'] / 1e9:>9.3g}{row['delta']:>9.4f}{row['loss']:>12.4f}"
                f"{row['effective_params']:>13.3g}{row['effective_parameter_multiplier']:>8.1%}"
                + ("*" if row["extrapolates"] else "")
            )
        lines += [
            "",
            "The lowest loss first. GB: the weights without embeddings, scales counted. Effective",
            "N: parameters of the unquantized model of this loss, the row's N times its worth.",
        ]
        outside = dict.fromkeys(text for row in self.rows for text in row["extrapolates"])
        return "\n".join([*lines, *(f"* extrapolation: {text}" for text in outside)])


def for_compute(
    flops: float, group_size: float, *, params: float | None = None, laws: LawSet = PAPER
) -> Budget:
    """Return what training with so many floating-point operations ends at.

    params: N; None: for each precision the best. Raises BitplanError for impossible values.
    """
    if not 0 < flops < math.inf:
        raise BitplanError(f"--flops {flops:g}: give a number above 0")
    check_values(group_size=group_size)
    found = []
    for choice in _choices(laws):

        def loss(n: float, choice: Choice = choice) -> float:
            d = flops / (FLOPS_PER_TOKEN * n)
            return laws.baseline.loss(n, d) + _delta(laws, choice, n, d, group_size)

        n = params or _argmin(loss, 1.0, flops / FLOPS_PER_TOKEN)
        check_values(params=n, tokens=flops / (FLOPS_PER_TOKEN * n))
        found.append(_row(laws, choice, n, flops / (FLOPS_PER_TOKEN * n), group_size))
    fixed = "the best N of each" if params is None else f"N {params:.4g}"
    return _sorted(f"{flops:.3g} FLOPs of training, {fixed}", group_size, found, laws)


def for_serving(
    size_bytes: float, tokens: float, group_size: float, *, laws: LawSet = PAPER
) -> Budget:
    """Return what models of so many bytes of weights end at after D training tokens.

    Raises BitplanError for impossible values.
    """
    if not 0 < size_bytes < math.inf:
        raise BitplanError(f"{size_bytes:g} bytes: give a number above 0")
    check_values(tokens=tokens, group_size=group_size)
    found = []
    for choice in _choices(laws):
        n = 8 * size_bytes / _weight_bits(choice, group_size)
        check_values(params=n)
        found.append(_row(laws, choice, n, tokens, group_size))
    return _sorted(f"{size_bytes:.4g} bytes of weights, D {tokens:.4g}", group_size, found, laws)


def _choices(laws: LawSet) -> list[Choice]:
    return [c for c in CHOICES if c.precision == LOSSLESS or c.precision in laws.laws]


def _weight_bits(choice: Choice, group_size: float) -> float:
    """Return the bits of a weight with its share of the scale."""
    return choice.weight_bits + parse_format("int4-g32").scale_bits / group_size


def _delta(laws: LawSet, choice: Choice, n: float, d: float, g: float) -> float:
    return 0.0 if choice.precision == LOSSLESS else laws.delta(choice.precision, n, d, g)


def _row(laws: LawSet, choice: Choice, n: float, d: float, g: float) -> dict[str, Any]:
    delta = _delta(laws, choice, n, d, g)
    multiplier = laws.baseline.multiplier(n, delta)
    return {
        "precision": choice.precision,
        "words": choice.words,
        "params": n,
        "tokens": d,
        "bytes": n * _weight_bits(choice, g) / 8,
        "delta": delta,
        "loss": laws.baseline.loss(n, d) + delta,
        "effective_params": n * multiplier,
        "effective_parameter_multiplier": multiplier,
        "extrapolates": laws.outside_grid(params=n, tokens=d, group_size=g),
    }


def _sorted(budget: str, group_size: float, rows: list[dict[str, Any]], laws: LawSet) -> Budget:
    rows.sort(key=lambda row: row["loss"])
    return Budget(budget=budget, group_size=group_size, rows=tuple(rows), source=laws.named)


def _argmin(loss: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function that is convex in log x is smallest, by golden section."""
    a, b = math.log(low), math.log(high)
    share = (math.sqrt(5) - 1) / 2
    while b - a > 1e-6:
        left, right = b - share * (b - a), a + share * (b - a)
        if loss(math.exp(left)) < loss(math.exp(right)):
            b = right
        else:
            a = left
    return math.exp((a + b) / 2)
