"""From measurements to tables: who is worse than bitplan beyond the interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from alternatives_choose import BASELINE, OURS, PLANS
from scipy import stats

from bitplan.qat.verdict import CONFIDENCE, Floats


@dataclass(frozen=True)
class Interval:
    """An estimate with a 95 % interval, nats per token."""

    estimate: float
    low: float
    high: float

    @classmethod
    def around(cls, estimate: float, *squared_half_widths: float) -> "Interval":
        half = math.sqrt(sum(squared_half_widths))
        return cls(estimate, estimate - half, estimate + half)


def t_squared(freedom: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) ** 2


def over_sequences(values: Floats) -> float:
    """Return the squared half width of a mean over sequences [sequence]."""
    return t_squared(len(values) - 1) * float(values.var(ddof=1)) / len(values)


def seed_variance(losses: Mapping[str, Floats]) -> tuple[float, int]:
    """Return the residual variance of choices x seeds, and its degrees of freedom.

    What is left of the losses [seed, sequence] when each choice and each seed has its own mean.
    With one seed nothing is known of it, and the intervals are those of the held-out text alone.
    """
    means = np.array([each.mean(1) for each in losses.values()])
    left = means - means.mean(1, keepdims=True) - means.mean(0) + means.mean()
    freedom = (means.shape[0] - 1) * (means.shape[1] - 1)
    return (float((left**2).sum()) / freedom if freedom else 0.0), max(freedom, 1)


def compare(choices: pl.DataFrame, measured: pl.DataFrame, trained: pl.DataFrame) -> list[Any]:
    """Return, for every budget, a row per alternative and the names that bitplan loses to."""
    untrained = {
        key: {c: f.sort("sequence")[key].to_numpy() for (c,), f in measured.group_by("choice")}
        for key in ("delta_loss", "kl")
    }
    losses = whole(trained, choices.filter(pl.col("name").is_in(list(PLANS)))["choice"].unique())
    variance, freedom = seed_variance(losses) if losses else (0.0, 1)
    base = losses.get(BASELINE)

    def means(rows: pl.DataFrame) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a named row's arrays, the mean over draws, and the draws' ranges."""
        ids = rows["choice"].to_list()
        arrays, ranges = {}, {}
        for key, known in (*untrained.items(), ("trained", losses)):
            found = [known[i] for i in ids if i in known]
            if found and (key != "trained" or base is not None):
                less = base if key == "trained" else 0.0
                arrays[key] = np.mean(found, axis=0) - less
                each = [float((one - less).mean()) for one in found]
                ranges[key] = {"draws": len(each), "least": min(each), "most": max(each)}
        return arrays, ranges

    def interval(key: str, values: Floats, draws: int) -> dict[str, float]:
        """Return the interval of a mean; `values` are differences from another choice."""
        if not values.any():
            return asdict(Interval(0.0, 0.0, 0.0))  # the same choice
        if key != "trained":
            return asdict(Interval.around(float(values.mean()), over_sequences(values)))
        noise = variance * (1 / draws + 1) / len(values)
        return asdict(
            Interval.around(
                float(values.mean()), t_squared(freedom) * noise, over_sequences(values.mean(0))
            )
        )

    budgets = []
    for (budget, limit), of_budget in choices.group_by("budget", "limit", maintain_order=True):
        ours, _ = means(of_budget.filter(name=OURS))
        rows = []
        for (name,), mine in of_budget.group_by("name", maintain_order=True):
            arrays, ranges = means(mine)
            spent = mine.select(pl.col("cost", "input_bits", "weight_bits").mean())
            row: dict[str, Any] = {"name": name} | spent.row(0, named=True)
            for key, values in arrays.items():
                draws = ranges[key]["draws"]
                row[key] = interval(key, values, draws)
                if key in ours:
                    row[f"{key}_over_bitplan"] = interval(key, values - ours[key], draws)
                if len(mine) > 1:
                    row[f"{key}_range"] = ranges[key]
            rows.append(row)
        loses = {
            key: [r["name"] for r in rows if r.get(f"{key}_over_bitplan", {}).get("high", 0) < 0]
            for key in TITLES
            if key in ours
        }
        budgets.append({"budget": budget, "limit": limit, "loses_to": loses, "rows": rows})
    return budgets


def whole(trained: pl.DataFrame, ours: pl.Series) -> dict[str, Floats]:
    """Return the losses [seed, sequence] of the choices trained under every seed that counts.

    A seed counts when the baseline and all of bitplan's choices are trained under it.
    """
    wanted = {BASELINE, *ours}
    found = trained.filter(pl.col("choice").is_in(wanted)).group_by("seed")
    count = found.agg(pl.col("choice").n_unique())
    seeds = count.filter(pl.col("choice") == len(wanted))["seed"]
    rows = trained.filter(pl.col("seed").is_in(seeds.implode())).sort("seed", "sequence")
    return {
        choice: of_choice["loss"].to_numpy().reshape(len(seeds), -1)
        for (choice,), of_choice in rows.group_by("choice", maintain_order=True)
        if of_choice["seed"].n_unique() == len(seeds)
    }


TITLES = {
    "delta_loss": "change of loss, not trained",
    "kl": "KL from the unquantized model, not trained",
    "trained": "loss over bf16 after training",
}


def summary(found: Sequence[Any], key: str) -> list[str]:
    """Return a line per alternative with an estimate per budget, and how bitplan stands to it."""
    # The last budget has room for every name.
    names = [row["name"] for budget in reversed(found) for row in budget["rows"]]
    cells: dict[str, dict[str, str]] = {name: {} for name in names}
    for budget in found:
        for row in budget["rows"]:
            if key in row:
                over = row[f"{key}_over_bitplan"]
                mark = ">" if over["low"] > 0 else "<" if over["high"] < 0 else " "
                text = f"{row[key]['estimate']:.4f}{mark}"
                cells[row["name"]][budget["budget"]] = text
    budgets = [budget["budget"] for budget in found]
    head = f"{'input bits':26}" + "".join(f"{budget:>14}" for budget in budgets)
    lines = [
        f"{name:26}" + "".join(f"{of.get(budget, ''):>14}" for budget in budgets)
        for name, of in cells.items()
        if of
    ]
    return ["", f"{TITLES[key]}, nats per token", head, *lines] if lines else []


def as_text(found: Sequence[Any]) -> str:
    """Return a table per quantity, then one per budget with the intervals."""
    lines = ["> above bitplan's beyond the interval of the difference, < below it"]
    for key in TITLES:
        lines += summary(found, key)

    def cell(one: Mapping[str, float] | None) -> str:
        if one is None:
            return f"{'':20}"
        return f"{one['estimate']:>10.4f} +- {(one['high'] - one['low']) / 2:.4f}"

    for budget in found:
        title = f"{budget['budget']} input bits: {budget['limit']:.3f} times the bit operations"
        heads = ("loss", "KL", "loss trained", "less bitplan's")
        lines += [
            "",
            f"{title} of 4-bit",
            f"{'':26}{'spent':>7}" + "".join(f"{h:>20}" for h in heads),
        ]
        for row in budget["rows"]:
            cells = "".join(cell(row.get(key)) for key in (*TITLES, "trained_over_bitplan"))
            lines.append(f"{row['name']:26}{row['cost']:>7.3f}{cells}")
            ranges = [row.get(f"{key}_range") for key in TITLES]
            if any(ranges):
                ends = (f"{r['least']:.4f} to {r['most']:.4f}" if r else "" for r in ranges)
                lines.append(f"{'  range of its draws':33}{''.join(f'{end:>20}' for end in ends)}")
        for key, names in budget["loses_to"].items():
            lines.append(f"bitplan loses, {TITLES[key]}: {', '.join(names) or 'to none'}")
    return "\n".join(lines)
