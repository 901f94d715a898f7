"""The scaling law of quantization-aware training, as arithmetic on plain numbers.

Equations and constants are those of arXiv 2505.14302:

    L(N, D, G)     = A / N^alpha + B / D^beta + E + delta_p(N, D, G)
    delta_p        = k * D^gamma_D * (log2 G)^gamma_G / N^gamma_N
    R(N, D, G)     = delta_w16a4 / delta_w4a16        inputs over weights
    multiplier     = (A / (A + delta * N^alpha))^(1 / alpha)

N non-embedding parameters, D training tokens, G group size in elements; losses in nats per token.
A precision is a row of PAPER; `+fc2` names the same with the inputs of FC2 at 8 bits. What lies
outside the grid that the constants were fitted on is named by `outside_grid`, never refused: the
law is most wanted where it was not fitted.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitplan.errors import BitplanError, FitError
from bitplan.rundir import read_json, write_json

FC2_AT_8 = "+fc2"
_LARGEST_EXPONENT = 700.0
"""Of e, that is still a float."""


@dataclass(frozen=True)
class Law:
    """What quantization costs under one precision: the constants of delta_p."""

    k: float
    gamma_n: float
    gamma_d: float
    gamma_g: float

    def delta(self, params: float, tokens: float, group_size: float) -> float:
        """Return delta, nats per token."""
        groups = math.log2(group_size) ** self.gamma_g
        return float(self.k * tokens**self.gamma_d * groups / params**self.gamma_n)


@dataclass(frozen=True)
class Baseline:
    """The loss of unquantized training: L = A / N^alpha + B / D^beta + E."""

    a: float
    b: float
    e: float
    alpha: float
    beta: float

    def loss(self, params: float, tokens: float) -> float:
        """Return the final loss, nats per token."""
        return float(self.a / params**self.alpha + self.b / tokens**self.beta + self.e)

    def multiplier(self, params: float, delta: float) -> float:
        """Return the share of its parameters that a model with this delta is worth."""
        return float((self.a / (self.a + delta * params**self.alpha)) ** (1 / self.alpha))


@dataclass(frozen=True)
class Grid:
    """The ranges that constants were fitted on, as (lowest, highest)."""

    params: tuple[float, float]
    tokens: tuple[float, float]
    group_size: tuple[float, float]


@dataclass(frozen=True)
class LawSet:
    """Laws that were fitted together: one per precision, their baseline, and where they hold."""

    source: str
    baseline: Baseline
    laws: dict[str, Law]
    grid: Grid
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """Precision to constant to the bounds of its 95 % interval, where they are known."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What it was fitted to: tables and their hashes, hardware, versions."""
    why: str = ""
    """Why it was chosen, where there was a choice (law_choice.py); not part of a file."""

    @property
    def named(self) -> str:
        """Where it is from and, where there was a choice, why it was chosen."""
        return f"{self.source} ({self.why})" if self.why else self.source

    def delta(self, precision: str, params: float, tokens: float, group_size: float) -> float:
        """Return delta of a precision, nats per token; raise BitplanError for an unknown one."""
        if precision not in self.laws:
            raise BitplanError(
                f"no law for precision {precision!r}: there is one for {', '.join(self.laws)}"
            )
        return self.laws[precision].delta(params, tokens, group_size)

    def has_ratio(self, *, fc2_at_8: bool) -> bool:
        """Return whether there are laws of inputs alone and of weights alone."""
        return {"w4a16", "w16a4" + FC2_AT_8 * fc2_at_8} <= self.laws.keys()

    def ratio(
        self,
        params: float,
        tokens: float,
        group_size: float,
        *,
        fc2_at_8: bool,
        weight_group_size: float | None = None,
    ) -> float:
        """Return R, what 4-bit inputs cost over what 4-bit weights cost.

        Weights have the inputs' group size where no other is given.
        """
        inputs = "w16a4" + FC2_AT_8 * fc2_at_8
        return self.delta(inputs, params, tokens, group_size) / self.delta(
            "w4a16", params, tokens, weight_group_size or group_size
        )

    def crossover_tokens(
        self,
        params: float,
        group_size: float,
        *,
        fc2_at_8: bool,
        weight_group_size: float | None = None,
    ) -> float | None:
        """Return the D at which R is 1: with more tokens the weights cost more than the inputs.

        None where the weights' cost does not grow faster than the inputs', so that there is none.
        """
        inputs, weights = self.laws["w16a4" + FC2_AT_8 * fc2_at_8], self.laws["w4a16"]
        at_one = self.ratio(
            params, 1.0, group_size, fc2_at_8=fc2_at_8, weight_group_size=weight_group_size
        )
        grows = weights.gamma_d - inputs.gamma_d
        exponent = math.log(at_one) / grows if grows > 0 else math.inf
        return math.exp(exponent) if exponent < _LARGEST_EXPONENT else None

    def outside_grid(self, **values: float) -> list[str]:
        """Name the values (params, tokens, group_size) that lie outside the fitted ranges."""
        found = []
        for name, value in values.items():
            low, high = getattr(self.grid, name)
            if not low <= value <= high:
                spelled = name.replace("_", " ")
                found.append(f"{spelled} {value:.4g} is outside the fitted {low:g} to {high:g}")
        return found


def write_laws(path: Path, laws: LawSet) -> None:
    """Write a law as JSON, which `read_laws` reads."""
    write_json(path, {name: value for name, value in asdict(laws).items() if name != "why"})


def read_laws(path: Path | None) -> LawSet:
    """Return the law of a file, or the paper's; raise FitError where the file holds none."""
    if path is None:
        return PAPER
    value = read_json(path)
    try:
        return LawSet(
            source=str(value["source"]),
            baseline=Baseline(**_numbers(value["baseline"])),
            laws={name: Law(**_numbers(law)) for name, law in value["laws"].items()},
            grid=Grid(**_pairs(value["grid"])),
            intervals={name: _pairs(v) for name, v in value.get("intervals", {}).items()},
            provenance=dict(value.get("provenance", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FitError(
            f"{path} holds no law: make one with `bitplan law fit RUN... -o FILE`"
        ) from error


def _pairs(value: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: (float(v[0]), float(v[1])) for name, v in value.items()}


def _numbers(value: dict[str, float]) -> dict[str, float]:
    return {name: float(number) for name, number in value.items()}


PAPER = LawSet(
    source="arXiv 2505.14302",
    baseline=Baseline(a=237.7042, b=596.2490, e=1.9279, alpha=0.3022, beta=0.3022),
    laws={
        "w4a4": Law(k=0.1582, gamma_n=0.2186, gamma_d=0.0745, gamma_g=0.7779),
        "w4a16": Law(k=0.2522, gamma_n=0.3589, gamma_d=0.1610, gamma_g=0.3533),
        "w16a4": Law(k=0.1004, gamma_n=0.1816, gamma_d=0.0331, gamma_g=0.9812),
        "w4a4" + FC2_AT_8: Law(k=0.3519, gamma_n=0.2637, gamma_d=0.0964, gamma_g=0.3407),
        "w16a4" + FC2_AT_8: Law(k=0.1273, gamma_n=0.2347, gamma_d=0.0827, gamma_g=0.4491),
    },
    # The 973M models of the paper test the fit and are no part of it.
    grid=Grid(params=(74e6, 595e6), tokens=(10e9, 100e9), group_size=(32, 256)),
)
