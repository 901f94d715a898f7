"""`bitplan plan --diff A B`: what changed between two plans of one checkpoint."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bitplan.errors import PlanError
from bitplan.planner.plan import Plan, Predicted, SiteChoice, load_plan
from bitplan.sites import ROLES

LABEL = 20
BLOCKS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class PlanDiff:
    """Two plans over the same sites."""

    a: Plan
    b: Plan
    names: tuple[str, str]

    @property
    def changed(self) -> list[tuple[SiteChoice, SiteChoice]]:
        """The sites whose format differs, as (in A, in B), in the order of the model."""
        after = {choice.site: choice for choice in self.b.sites}
        pairs = [(choice, after[choice.site]) for choice in self.a.sites]
        return [(x, y) for x, y in pairs if x.format != y.format]

    @property
    def notes(self) -> list[str]:
        """What makes the predictions of the two no fair comparison."""
        found = []
        models = [p.provenance.get("model", {}).get("content_hash") for p in (self.a, self.b)]
        if models[0] != models[1]:
            found.append("the two are of checkpoints with the same sites and other weights")
        factors = [(p.advice or {}).get("factors") for p in (self.a, self.b)]
        if factors[0] != factors[1]:
            found.append("predictions are at two scales: --tokens brought them to the scaling law")
        if len({p.predicted.delta_loss is None for p in (self.a, self.b)}) > 1:
            found.append("only one of them was made with sensitivities")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return both plans' heads, the changed sites, and every predicted quantity."""
        return {
            "a": self._head(0),
            "b": self._head(1),
            "changed": [
                {
                    "site": x.site,
                    "role": x.role,
                    "block": x.block,
                    "operand": x.operand,
                    "format": [str(x.format), str(y.format)],
                    "bits": [x.bits, y.bits],
                    "delta_loss": [x.delta_loss, y.delta_loss],
                }
                for x, y in self.changed
            ],
            "predicted": {
                name: {"a": x, "b": y, "change": None if None in (x, y) else y - x}
                for name, (x, y) in self._quantities().items()
            },
            "notes": self.notes,
        }

    def _head(self, i: int) -> dict[str, Any]:
        plan = (self.a, self.b)[i]
        return {
            "name": self.names[i],
            "plan_id": plan.plan_id,
            "made_by": plan.made_by,
            "budget": dict(plan.budget),
            "pins": list(plan.pins),
            "shares": list(plan.shares),
        }

    def _quantities(self) -> Mapping[str, tuple[Any, Any]]:
        x, y = asdict(self.a.predicted), asdict(self.b.predicted)
        return {f.name: (x[f.name], y[f.name]) for f in fields(Predicted)}

    def as_text(self) -> str:
        """Return heads, the changed formats by role and block, and the predictions of both."""
        lines = [self._title(i) for i in (0, 1)]
        changed = self.changed
        total = sum(choice.planned for choice in self.a.sites)
        lines += ["", f"{len(changed)} of {len(self.a.sites)} sites ({total} planned) changed"]
        lines += [*_by_role(changed), "", *self._table()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _title(self, i: int) -> str:
        head = self._head(i)
        budget = ", ".join(f"{name} <= {value:.6g}" for name, value in head["budget"].items())
        extras = [*(f"pin {p}" for p in head["pins"]), *(f"share {s}" for s in head["shares"])]
        under = f" under {', '.join([*([budget] if budget else []), *extras])}"
        made = head["made_by"] + (under if budget or extras else "")
        return f"{'AB'[i]}: {head['name']}, plan {head['plan_id']}, {made}"

    def _table(self) -> Iterator[str]:
        yield f"{'predicted':<{LABEL}}{'A':>14}{'B':>14}{'B - A':>14}"
        for name, (x, y) in self._quantities().items():
            if x is None and y is None:
                continue
            change = "-" if None in (x, y) else f"{y - x:+.6g}"
            yield f"{name:<{LABEL}}{_spell(x):>14}{_spell(y):>14}{change:>14}"


def diff_plans(a: Path, b: Path) -> PlanDiff:
    """Return what changed from plan A to plan B, each a run directory or a plan.json.

    Raises RunError where one is missing, PlanError where one is damaged or their sites differ.
    """
    first, second = load_plan(a), load_plan(b)
    gone = [site for site in first.assignment if site not in second.assignment]
    new = [site for site in second.assignment if site not in first.assignment]
    if gone or new:
        missing = f"{b} lacks {gone[0]}" if gone else f"{a} lacks {new[0]}"
        raise PlanError(
            f"--diff: the plans are of different checkpoints, {len(gone) + len(new)} sites are in "
            f"one alone ({missing}): compare plans of one checkpoint"
        )
    return PlanDiff(a=first, b=second, names=(str(a), str(b)))


def _by_role(changed: list[tuple[SiteChoice, SiteChoice]]) -> Iterator[str]:
    """Yield a line per role, operand and change of format, with the blocks it happened in."""
    groups: dict[tuple[str, str, str], list[int | None]] = defaultdict(list)
    for x, y in changed:
        groups[x.role, x.operand, f"{x.format} -> {y.format}"].append(x.block)
    order = {role: i for i, role in enumerate(ROLES)}
    for (role, operand, change), blocks in sorted(
        groups.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0])
    ):
        inside = sorted({block for block in blocks if block is not None})
        shown = ", ".join(map(str, inside[:BLOCKS_SHOWN]))
        more = f" and {len(inside) - BLOCKS_SHOWN} more" if len(inside) > BLOCKS_SHOWN else ""
        where = f", block{'s' if len(inside) > 1 else ''} {shown}{more}" if inside else ""
        yield f"{role + ':' + operand:<{LABEL}}{change}  {len(blocks)} sites{where}"


def _spell(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
