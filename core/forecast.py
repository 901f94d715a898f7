"""`bitplan law`: forecasts of a scaling law (law.py) as results with text and JSON.

Nothing is trained or read: the numbers follow from N, D and G alone, so they say what to expect of
a training like those that the law was fitted on, and every result says where it extrapolates.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitplan.errors import BitplanError
from bitplan.law import FC2_AT_8, PAPER, LawSet

PRECISIONS = ("w4a4", "w4a16", "w16a4")
CROSSOVER_PARAMS = (74e6, 145e6, 297e6, 595e6, 1e9, 7e9, 70e9)
CROSSOVER_GROUPS = (32, 64, 128, 256)
CROSSOVER_NEEDS = ("w4a16", "w16a4", "w16a4" + FC2_AT_8)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a precision is predicted to cost, with and without 8 bits at the inputs of FC2."""

    params: float
    tokens: float
    group_size: float
    rows: tuple[dict[str, Any], ...]
    R: dict[str, float | None]
    """None where the law has no row for it."""
    extrapolates: tuple[str, ...]
    source: str

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def as_text(self) -> str:
        """Return a table: a row per precision."""
        lines = [
            f"N {self.params:.4g}, D {self.tokens:.4g}, G {self.group_size:g}; {self.source}",
            "",
            f"{'precision':26}{'delta':>9}{'final loss':>12}{'worth':>8}",
        ]
        for row in self.rows:
            lines.append(
                f"{_name(row['precision']):26}{row['delta']:9.4f}{row['loss']:12.4f}"
                f"{row['effective_parameter_multiplier']:8.1%}"
            )
        lines += [
            "delta and loss: nats per token; worth: the share of its parameters with which an",
            "unquantized model has this loss (4 bits are half of 8: above 50 % they pay)",
            "",
            f"R {_ratio(self.R['all_inputs_at_4'])}; with FC2 inputs at 8 bits "
            f"{_ratio(self.R['fc2_inputs_at_8'])} (above 1: activation-limited)",
        ]
        return "\n".join([*lines, *_warnings(self.extrapolates)])


def predict(
    params: float, tokens: float, group_size: float, precision: str, laws: LawSet = PAPER
) -> Forecast:
    """Return what `precision` costs at N params, D tokens and G group_size.

    Raises BitplanError for values that no training has, or a precision without a law.
    """
    check_values(params=params, tokens=tokens, group_size=group_size)
    names = [precision, precision + FC2_AT_8]
    rows = []
    for name in [name for name in names if name == precision or name in laws.laws]:
        delta = laws.delta(name, params, tokens, group_size)
        rows.append(
            {
                "precision": name,
                "delta": delta,
                "loss": laws.baseline.loss(params, tokens) + delta,
                "effective_parameter_multiplier": laws.baseline.multiplier(params, delta),
            }
        )
    return Forecast(
        params=params,
        tokens=tokens,
        group_size=group_size,
        rows=tuple(rows),
        R={
            name: laws.ratio(params, tokens, group_size, fc2_at_8=fc2_at_8)
            if laws.has_ratio(fc2_at_8=fc2_at_8)
            else None
            for name, fc2_at_8 in (("all_inputs_at_4", False), ("fc2_inputs_at_8", True))
        },
        extrapolates=tuple(laws.outside_grid(params=params, tokens=tokens, group_size=group_size)),
        source=laws.named,
    )


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """The tokens at which the weights come to cost as much as the inputs, over N and G.

    None where they never do: their cost does not grow faster with tokens than the inputs'.
    """

    rows: tuple[dict[str, Any], ...]
    source: str

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def as_text(self) -> str:
        """Return a table: a row per N, columns G, tokens and tokens per parameter."""
        groups = list(dict.fromkeys(row["group_size"] for row in self.rows))
        lines = [f"Tokens at which R = 1 (tokens per parameter); law of {self.source}"]
        for key, title in (
            ("all_inputs_at_4", "all inputs at 4 bits"),
            ("fc2_inputs_at_8", "FC2 inputs at 8 bits"),
        ):
            lines += ["", f"{title:24}" + "".join(f"{f'G {g:g}':>19}" for g in groups)]
            for params in dict.fromkeys(row["params"] for row in self.rows):
                cells = [row for row in self.rows if row["params"] == params]
                text = "".join(_cell(row[key], params, row["extrapolates"][key]) for row in cells)
                lines.append(f"N {params:<22.4g}{text}")
        lines += [
            "",
            "Below these the inputs cost more (activation-limited), above them the weights do.",
            "* outside the ranges that the law was fitted on",
        ]
        return "\n".join(lines)


def crossover(
    params: Sequence[float] = CROSSOVER_PARAMS,
    group_sizes: Sequence[float] = CROSSOVER_GROUPS,
    laws: LawSet = PAPER,
) -> Crossover:
    """Return the D at which R is 1 for every N and G; raise BitplanError for impossible values."""
    for fc2_at_8 in (False, True):
        if not laws.has_ratio(fc2_at_8=fc2_at_8):
            raise BitplanError(
                f"the law of {laws.source} has no rows for w4a16 and w16a4"
                f"{FC2_AT_8 * fc2_at_8}: crossover needs both"
            )
    rows = []
    for n in params:
        for g in group_sizes:
            check_values(params=n, group_size=g)
            tokens = {
                "all_inputs_at_4": laws.crossover_tokens(n, g, fc2_at_8=False),
                "fc2_inputs_at_8": laws.crossover_tokens(n, g, fc2_at_8=True),
            }
            outside = {
                key: bool(
                    laws.outside_grid(
                        params=n, group_size=g, **({} if d is None else {"tokens": d})
                    )
                )
                for key, d in tokens.items()
            }
            rows.append({"params": n, "group_size": g, **tokens, "extrapolates": outside})
    return Crossover(rows=tuple(rows), source=laws.named)


def _cell(tokens: float | None, params: float, extrapolates: bool) -> str:
    found = "never"
    if tokens is not None:
        ratio = tokens / params
        found = f"{tokens:.1e} ({ratio:>{'7,.0f' if ratio < 1e6 else '7.1e'}})"
    return f"{found:>18}" + ("*" if extrapolates else " ")


def check_values(**values: float) -> None:
    """Raise BitplanError for params, tokens or a group_size that no training has."""
    for name, value in values.items():
        least = 2 if name == "group_size" else 1
        if not least <= value < float("inf"):
            raise BitplanError(
                f"--{name.replace('_', '-')} {value:g}: give a number of at least {least}"
            )


def _ratio(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _name(precision: str) -> str:
    return precision.replace(FC2_AT_8, ", FC2 inputs at 8 bits")


def _warnings(extrapolates: Sequence[str]) -> list[str]:
    return [f"extrapolation: {text}" for text in extrapolates]
