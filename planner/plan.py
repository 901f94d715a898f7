"""The plan: one format for every site, what that is predicted to cost, and why.

An immutable value and the text of plan.json, both ways: `Plan.from_json(plan.as_json()) == plan`.
`plan_id` is a hash of the formats alone: plans that quantize alike have the same one, however
they were found. Sites that no plan touches (embeddings, lm_head, ...) are listed with bf16, so that
a plan names every site of its checkpoint and `check_sites` can tell when the checkpoint is another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from bitplan.errors import PlanError
from bitplan.formats import Format, parse_format
from bitplan.rundir import SCHEMA_VERSION, RunDir, content_hash, read_json
from bitplan.sites import Site

PLAN_FILE = "plan.json"
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class NextBest:
    """The alternative to a choice: another format for the same decision, all else unchanged."""

    format: str
    delta_loss: float
    """Change of the predicted objective if it were taken; negative: it would be better."""
    bits: float
    """Change of the operand's average effective bits if it were taken."""


@dataclass(frozen=True, kw_only=True)
class SiteChoice:
    """What a plan says about one site; `delta_loss` is null where there was no sensitivity."""

    site: str
    format: Format
    role: str
    block: int | None
    planned: bool
    """Whether the site counts in the averages."""
    bits: float
    """Effective bits per element."""
    delta_loss: float | None
    raw_delta_loss: float | None
    """As measured, before noise was removed."""
    stderr: float | None
    method: str | None
    relative_error: float | None
    forced: str | None
    """What left no choice: `role`, `pin`, `rule`, `share`, `budget`; null: the planner chose."""
    next_best: NextBest | None
    reason: str
    kurtosis_misleads: bool = False
    """A high kurtosis on an input that does not suffer; see reasons.py."""

    @property
    def operand(self) -> str:
        """`weight` or `input`."""
        return Site.parse(self.site).operand

    def as_json(self) -> dict[str, Any]:
        """Return the entry of plan.json: every field but the site, which is its key."""
        entry = {**asdict(self), "format": str(self.format)}
        del entry["site"]
        return entry


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a plan is predicted to cost; null where the run holds nothing to predict it from."""

    objective: float
    """What was minimized: `delta_loss`, or without sensitivity the weighted relative error."""
    delta_loss: float | None
    delta_loss_weights: float | None
    delta_loss_inputs: float | None
    R: float | None
    """delta_loss_inputs over delta_loss_weights."""
    weight_bits: float | None
    input_bits: float | None
    bit_ops: float | None
    bytes: float
    time_ms: float | None = None
    R_trained: float | None = None
    """R after training, from what verify has trained so far; null where it was not asked for."""
    stderr: float | None = None
    """Standard error of delta_loss."""
    kl: float | None = None
    """Sum of the sites' KL divergence, nats per token."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a plan costs with all its sites quantized at once, nats per token."""

    delta_loss: float
    stderr: float | None
    kl: float
    kl_stderr: float | None
    tokens: int
    agrees: bool
    """Whether the predicted change of loss lies within two standard errors of the measured one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A format for every site of a checkpoint, with budget, prediction, reasons and provenance."""

    made_by: str
    """`optimal`, `converge`, or `rule NAME`."""
    sites: tuple[SiteChoice, ...]
    predicted: Predicted
    budget: Mapping[str, float]
    device: str | None = None
    measured: Measured | None = None
    optimality_gap: float | None = None
    """(objective - proven lower bound) / objective; null for a rule."""
    formats: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    per_role: bool = False
    quantizers: Mapping[str, str] = field(default_factory=dict)
    """Site to quantizer, where training is not to take the default (quantizers.py)."""
    advice: Mapping[str, Any] | None = None
    """The scaling law's forecast and where the next bit should go; null without --tokens."""
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def assignment(self) -> dict[str, Format]:
        """Site to format, in the order of the model."""
        return {choice.site: choice.format for choice in self.sites}

    @property
    def plan_id(self) -> str:
        """16 hex digits that identify the formats of all sites."""
        return content_hash({site: str(format_) for site, format_ in self.assignment.items()})

    def as_json(self) -> dict[str, Any]:
        """Return the text of plan.json as a JSON value."""
        return {
            "schema": SCHEMA_VERSION,
            "plan_id": self.plan_id,
            "made_by": self.made_by,
            "budget": dict(self.budget),
            "device": self.device,
            "predicted": asdict(self.predicted),
            "measured": None if self.measured is None else asdict(self.measured),
            "optimality_gap": self.optimality_gap,
            "formats": list(self.formats),
            "pins": list(self.pins),
            "shares": list(self.shares),
            "per_role": self.per_role,
            "quantizers": dict(self.quantizers),
            "advice": None if self.advice is None else dict(self.advice),
            "notes": list(self.notes),
            "sites": {choice.site: choice.as_json() for choice in self.sites},
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Return the plan that a JSON value spells; raise PlanError for anything else."""
        try:
            if value["schema"] != SCHEMA_VERSION:
                raise PlanError(
                    f"the plan has schema version {value['schema']!r}, this bitplan reads "
                    f"{SCHEMA_VERSION}: plan again"
                )
            keys = {f.name for f in fields(cls)} - {"sites", "predicted", "measured"}
            # What a plan of an earlier version does not know of, it does not have.
            plain = {key: _frozen(value[key]) for key in sorted(keys) if key in value}
            plan = cls(
                sites=tuple(_choice(site, entry) for site, entry in value["sites"].items()),
                predicted=Predicted(**value["predicted"]),
                measured=Measured(**measured) if (measured := value.get("measured")) else None,
                **plain,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the plan is not whole ({error!r}): plan again") from error
        if plan.plan_id != value.get("plan_id"):
            raise PlanError(
                f"the plan's formats (id {plan.plan_id}) are not those it was made with "
                f"(plan_id {value.get('plan_id')!r}): plan again, with --pin for changes by hand"
            )
        return plan

    def check_sites(self, sites: Iterable[str]) -> None:
        """Raise PlanError unless the plan's sites are exactly those of a checkpoint."""
        found, planned = set(sites), set(self.assignment)
        problems = []
        if gone := sorted(planned - found):
            problems.append(f"the checkpoint lacks {_some(gone)}")
        if new := sorted(found - planned):
            problems.append(f"the plan lacks {_some(new)}")
        if problems:
            raise PlanError(
                f"the plan was made for another checkpoint: {' and '.join(problems)}; "
                "profile this checkpoint and plan again"
            )


def load_plan(path: Path) -> Plan:
    """Read the plan of a run directory or of a plan.json; raise what read_plan raises."""
    return read_plan(RunDir.open(path)) if path.is_dir() else Plan.from_json(read_json(path))


def read_plan(run: RunDir) -> Plan:
    """Read RUN/plan.json; raise RunError where it is missing, PlanError where it is damaged."""
    return Plan.from_json(run.read_json(PLAN_FILE))


def _choice(site: str, entry: Mapping[str, Any]) -> SiteChoice:
    next_best = entry["next_best"]
    return SiteChoice(
        **{
            **entry,
            "site": site,
            "format": parse_format(entry["format"]),
            "next_best": None if next_best is None else NextBest(**next_best),
        }
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _some(names: list[str]) -> str:
    """Name a few of the names and count the rest."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
