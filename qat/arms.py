"""The arms: the trainings whose losses a verdict compares, one row each.

An arm is a name and a function from the plan to the formats of the sites it quantizes; every other
site stays in bf16. `4` in a name stands for the lowest-bit format that the plan was allowed, so
that the same arms serve a plan made from 2-bit or 6-bit formats; which formats they are is in each
arm's record. Arms whose formats come out equal (a plan that keeps every weight at 4 bits has its
weights in common with w4a16) are one training.

Attribution arms are w4a4 but for the inputs, or the weights, of one role, which take the cheapest
format of 8 bits. What an arm gives back of w4a4's delta is what that role and operand cost: whether
FC2's inputs are the bottleneck is measured and not assumed. `w4a4-hadamard` keeps FC2 at 4 bits and
rotates it, so that its delta can be held against that of w4a4-fc2-input-8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bitplan.errors import BitplanError, PlanError
from bitplan.formats import DEFAULT_LOW, Format, Operand, parse_format
from bitplan.planner.plan import Plan
from bitplan.sites import OPERANDS, PLANNED_ROLES, Site

Formats = Mapping[Site, Format]


@dataclass(frozen=True)
class Arm:
    """One training: its name, the formats it trains under, and what it is for."""

    name: str
    formats: Callable[[Plan], Formats]
    meaning: str
    rotated: str | None = None
    """A role whose operands are rotated before they are rounded (rotation.py)."""


def lowest(plan: Plan, operand: Operand) -> Format:
    """Return the format of the fewest bits that the plan could give an operand.

    Raises PlanError where it could give none but bf16.
    """
    allowed = [parse_format(name) for name in plan.formats]
    allowed += [choice.format for choice in plan.sites if choice.operand == operand]
    fitting = [fmt for fmt in allowed if fmt.is_quantized and fmt.applies_to(operand)]
    if not fitting:
        raise PlanError(
            f"no format of the plan quantizes {operand}s (it may use: "
            f"{', '.join(plan.formats) or 'none'}): plan again with --formats {DEFAULT_LOW},..."
        )
    return min(fitting, key=lambda fmt: fmt.bits)  # the first of equals


def eight_bits(plan: Plan, operand: Operand) -> Format | None:
    """Return the cheapest format of at least 8 bits that the plan could give an operand, if any."""
    allowed = [parse_format(name) for name in plan.formats]
    fitting = [
        f for f in allowed if f.is_quantized and f.bits >= HIGH_BITS and f.applies_to(operand)
    ]
    return min(fitting, key=lambda fmt: fmt.bits, default=None)


def _uniform(*operands: Operand) -> Callable[[Plan], Formats]:
    """Every planned site of the operands at the lowest format."""

    def formats(plan: Plan) -> Formats:
        chosen = {operand: lowest(plan, operand) for operand in operands}
        return {
            site: chosen[site.operand]
            for site, fmt, planned in _sites(plan)
            if site.operand in chosen and (planned or fmt.is_quantized)
        }

    return formats


def _chosen(*operands: Operand) -> Callable[[Plan], Formats]:
    """Every site of the operands at the plan's own format."""

    def formats(plan: Plan) -> Formats:
        return {
            site: fmt
            for site, fmt, _ in _sites(plan)
            if site.operand in operands and fmt.is_quantized
        }

    return formats


def _sites(plan: Plan) -> list[tuple[Site, Format, bool]]:
    return [(Site.parse(choice.site), choice.format, choice.planned) for choice in plan.sites]


def _spared(role: str, operand: Operand, high: Format) -> Callable[[Plan], Formats]:
    """As w4a4, with one operand of a role in a higher format."""

    def formats(plan: Plan) -> Formats:
        spared = {
            Site.parse(choice.site)
            for choice in plan.sites
            if (choice.role, choice.operand) == (role, operand)
        }
        low = _uniform(*OPERANDS)(plan)
        return {site: high if site in spared else fmt for site, fmt in low.items()}

    return formats


BASELINE = "bf16"
UNIFORM = "w4a4"
HIGH_BITS = 8
_ROWS = (
    Arm(BASELINE, _chosen(), "nothing quantized: what every delta is measured from"),
    Arm("w4a16", _uniform("weight"), "weights at the lowest format"),
    Arm("w16a4", _uniform("input"), "inputs at the lowest format"),
    Arm(UNIFORM, _uniform("weight", "input"), "both at the lowest format"),
    Arm("planned", _chosen(*OPERANDS), "the plan"),
    Arm("planned-weights", _chosen("weight"), "the plan's weights alone"),
    Arm("planned-inputs", _chosen("input"), "the plan's inputs alone"),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ROWS}

# Trained where they are named, and no part of the verdict.
_EXTRA_ROWS = (
    Arm(
        f"{UNIFORM}-hadamard",
        _uniform("weight", "input"),
        "w4a4 with a Hadamard rotation before fc2: the other way than 8 bits there",
        rotated="fc2",
    ),
)
EXTRA_ARMS: dict[str, Arm] = {arm.name: arm for arm in _EXTRA_ROWS}

# R is the delta of the first arm over that of the second.
RATIOS = {"before": ("w16a4", "w4a16"), "after": ("planned-inputs", "planned-weights")}


def attribution_arms(plan: Plan) -> dict[tuple[str, Operand], Arm]:
    """Return the arm that spares each role and operand of the plan, in the order of the roles.

    An operand that the plan could give no format of 8 bits has none.
    """
    planned = {(choice.role, choice.operand) for choice in plan.sites if choice.planned}
    return {
        (role, operand): Arm(
            f"{UNIFORM}-{role}-{operand}-8",
            _spared(role, operand, high),
            f"{UNIFORM}, {role} {operand}s at {HIGH_BITS} bits",
        )
        for role in PLANNED_ROLES
        for operand in OPERANDS
        if (role, operand) in planned and (high := eight_bits(plan, operand))
    }


def select_arms(names: tuple[str, ...]) -> tuple[Arm, ...]:
    """Return the named arms in the tables' order; of no names, all but the extra ones.

    Raises BitplanError for a name that is not in the tables.
    """
    known = {**ARMS, **EXTRA_ARMS}
    if unknown := [name for name in names if name not in known]:
        raise BitplanError(f"no arm {', '.join(unknown)}: the arms are {', '.join(known)}")
    return tuple(arm for arm in known.values() if arm.name in (names or ARMS))
