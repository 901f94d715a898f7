"""What a plan may spend, as a table of linear costs.

Every budget is linear in the choices: either in those of single sites (average bits, bytes), or in
the pair of formats of a linear's two operands (bit operations, time). A `Cost` holds the numbers,
[S, F] and [L, F, F]; sites that are not the planner's to decide carry the number of their fixed
format in every column. A new budget is a row of BUDGETS.

    input_bits    sum of MACs x effective bits / sum of MACs               scales counted
    weight_bits   sum of parameters x effective bits / sum of parameters   scales counted
    bit_ops       sum of MACs per token x weight bits x input bits         element bits
    bytes         sum of parameters x effective bits / 8                   scales counted
    time          2 x MACs x 4,096 tokens / the device's dense rate for the pair, in ms
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bitplan.errors import PlanError
from bitplan.formats import Operand
from bitplan.options import PlanOptions
from bitplan.planner.devices import FORWARD_TOKENS, Device, parse_time, rate_tops
from bitplan.planner.predict import Floats
from bitplan.planner.problem import ABSENT, UNFIXED, Ints, Problem
from bitplan.planner.shares import Share

BITS_PER_BYTE = 8
_ROUNDING = 1e-6
"""Of a count of sites: 0.1 of ten sites is one of them, whatever the product comes to."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A quantity that adds up over sites [S, F], and over the format pairs of linears [L, F, F]."""

    site: Floats
    pair: Floats | None = None

    def total(self, problem: Problem, choice: Ints) -> float:
        """Return what a choice [S] uses of the quantity."""
        used = float(np.take_along_axis(self.site, choice[:, None], axis=1).sum())
        if self.pair is not None:
            weight, input_ = (chosen(problem, choice, o) for o in ("weight", "input"))
            used += float(self.pair[np.arange(len(self.pair)), weight, input_].sum())
        return used

    @property
    def ceiling(self) -> float:
        """A value that no choice exceeds."""
        pair = 0.0 if self.pair is None else float(self.pair.max(axis=(1, 2)).sum())
        return float(self.site.max(axis=1).sum()) + pair


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A quantity that can be limited: the operands it restrains, and how it is counted."""

    name: str
    unit: str
    operands: tuple[Operand, ...]
    cost: Callable[[Problem, Device | None], Cost]

    @property
    def needs_inputs(self) -> bool:
        """Whether a weights-only profile lacks what this is counted from."""
        return "input" in self.operands


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A budget and how much of it a plan may use."""

    budget: Budget
    value: float
    device: Device | None = None

    def cost(self, problem: Problem) -> Cost:
        """Return the budget's cost table."""
        return self.budget.cost(problem, self.device)

    def __str__(self) -> str:
        device = f" on {self.device.name}" if self.device else ""
        return f"{self.budget.name} <= {self.value:.6g}{device}"


def held(problem: Problem, table: Floats) -> Floats:
    """Return a site table [S, F] with the number of the fixed format in every column."""
    rows = np.arange(len(table))
    fixed = table[rows, np.maximum(problem.fixed, 0)]
    return np.where((problem.fixed != UNFIXED)[:, None], fixed[:, None], table)


def objective(problem: Problem, operands: tuple[Operand, ...] = ("weight", "input")) -> Cost:
    """Return the predicted loss as a cost, of all sites or of one operand's."""
    mask = np.any([problem.mask(operand) for operand in operands], axis=0)
    return Cost(site=held(problem, np.where(mask[:, None], problem.objective, 0.0)))


def share_cost(problem: Problem, share: Share) -> Cost:
    """Return the share of a share's sites that go against it, as a cost; see Share.limit."""
    sites = list(problem.shares[share])
    against = np.array([share.takes(str(f)) == share.is_most for f in problem.formats])
    table = np.zeros_like(problem.bits)
    table[sites] = against / len(sites)
    return Cost(site=held(problem, table))


def share_limit(problem: Problem, share: Share) -> float:
    """Return how much that cost may be: Share.limit, in whole sites.

    The same choices keep to it, and the relaxation is the closer: what it could gain by a part of
    a site took the solver most of its time.
    """
    count = len(problem.shares[share])
    return math.floor(share.limit * count + _ROUNDING) / count


def _average_bits(operand: Operand) -> Callable[[Problem, Device | None], Cost]:
    def cost(problem: Problem, _device: Device | None) -> Cost:
        share = np.where(problem.mask(operand), problem.weight_in_average, 0.0)
        return Cost(site=held(problem, share[:, None] * problem.bits))

    return cost


def _bytes(problem: Problem, _device: Device | None) -> Cost:
    size = np.where(problem.mask("weight"), problem.params[problem.linear], 0.0)
    return Cost(site=held(problem, size[:, None] * problem.bits / BITS_PER_BYTE))


def _bit_ops(problem: Problem, _device: Device | None) -> Cost:
    bits = np.array([float(f.bits) for f in problem.formats])
    return _per_mac(problem, np.multiply.outer(bits, bits))


def _time(problem: Problem, device: Device | None) -> Cost:
    assert device is not None
    rates = [[rate_tops(device, w, i) for i in problem.formats] for w in problem.formats]
    return _per_mac(problem, 2 * FORWARD_TOKENS * 1e3 / (np.array(rates) * 1e12))


def _per_mac(problem: Problem, price: Floats) -> Cost:
    """Return a cost of `price` [F, F] (weight format, input format) per multiply-accumulate."""
    weight, input_ = (held_columns(problem, o) for o in ("weight", "input"))
    pair = price[weight[:, :, None], input_[:, None, :]]
    counted = np.zeros(len(problem.macs), dtype=bool)
    counted[problem.linear[problem.counted]] = True
    macs = np.where(counted, problem.macs, 0.0)
    return Cost(site=np.zeros_like(problem.bits), pair=macs[:, None, None] * pair)


def held_columns(problem: Problem, operand: Operand) -> Ints:
    """Return [L, F]: the format index that stands behind each column of a linear's operand."""
    columns = np.arange(len(problem.formats))
    fixed = chosen(problem, problem.fixed, operand)[:, None]
    return np.where(fixed == UNFIXED, columns[None, :], fixed)


def chosen(problem: Problem, choice: Ints, operand: Operand) -> Ints:
    """Return [L]: the format index of each linear's operand; bf16 where it has no such site."""
    site = problem.site_of(operand)
    return np.where(site == ABSENT, len(problem.formats) - 1, choice[np.maximum(site, 0)])


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(name="input_bits", unit="bits", operands=("input",), cost=_average_bits("input")),
        Budget(name="weight_bits", unit="bits", operands=("weight",), cost=_average_bits("weight")),
        Budget(name="bit_ops", unit="per token", operands=("weight", "input"), cost=_bit_ops),
        Budget(name="bytes", unit="bytes", operands=("weight",), cost=_bytes),
        Budget(name="time", unit="ms", operands=("weight", "input"), cost=_time),
    )
}


def asked_limits(options: PlanOptions) -> list[Limit]:
    """Return the limits that the options ask for; raise PlanError for values that make no sense."""
    limits = []
    for name, budget in BUDGETS.items():
        value = getattr(options, name)
        if value is None:
            continue
        if name == "time":
            device, limit_ms = parse_time(value)
            limits.append(Limit(budget=budget, value=limit_ms, device=device))
        elif math.isfinite(value) and value > 0:
            limits.append(Limit(budget=budget, value=float(value)))
        else:
            raise PlanError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    return limits
