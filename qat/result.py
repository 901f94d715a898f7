"""The result of `bitplan verify`: a value, the text of verdict.json both ways, and its words."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from bitplan.qat import verdict as arithmetic
from bitplan.qat.arms import BASELINE
from bitplan.qat.verdict import Interval, Word
from bitplan.rundir import SCHEMA_VERSION

VERDICT_FILE = "verdict.json"


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What one arm came to: loss and delta in nats per token on the held-out text."""

    name: str
    formats: str
    loss: float
    delta: Interval | None
    """None where bf16 was not trained."""
    seeds: int
    same_as: str | None
    """The arm with the same formats that was trained in its stead."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What 8 bits at one role alone give back of w4a4's delta, nats per token."""

    role: str
    weight: Interval | None
    """With the role's weights at 8 bits; None where that arm was not trained."""
    input: Interval | None
    """With its inputs."""
    R: Interval | None
    """input over weight."""

    @classmethod
    def from_json(cls, role: str, value: Mapping[str, Any]) -> Self:
        """Return the entry of verdict.json for a role."""
        return cls(role=role, **{k: None if v is None else Interval(**v) for k, v in value.items()})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the plan's weight and activation errors converge, and what that rests on."""

    verdict: Word
    sentence: str
    before: Interval
    """R with every planned site at the lowest format."""
    after: Interval
    """R under the plan."""
    arms: tuple[ArmResult, ...]
    missing: tuple[str, ...]
    """Arms that were not trained yet."""
    seeds: int
    """Trained per arm: all that were allowed, or as many as it took."""
    seeds_allowed: int
    confidence: float
    tokens: int
    """Training tokens per arm and seed."""
    heldout_tokens: int
    attribution: tuple[Attribution, ...] = ()
    """By role; empty where no attribution arm was trained."""
    noise: Mapping[str, float | None]
    needed: Mapping[str, int] | None
    """Seeds and held-out tokens that would settle an undetermined verdict."""
    notes: tuple[str, ...]
    plan_id: str
    provenance: Mapping[str, Any]
    run: str = ""
    up_to_date: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the text of verdict.json as a JSON value."""
        return {
            "schema": SCHEMA_VERSION,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "R": {"before": asdict(self.before), "after": asdict(self.after)},
            "delta": {
                arm.name: {**asdict(arm.delta), "seeds": arm.seeds}
                for arm in self.arms
                if arm.delta is not None
            },
            "tolerance": list(arithmetic.TOLERANCE),
            "confidence": self.confidence,
            "noise": dict(self.noise),
            "arms": {
                arm.name: {
                    "formats": arm.formats,
                    "loss": arm.loss,
                    "seeds": arm.seeds,
                    "same_as": arm.same_as,
                }
                for arm in self.arms
            },
            "attribution": {
                entry.role: {k: v for k, v in asdict(entry).items() if k != "role"}
                for entry in self.attribution
            },
            "missing": list(self.missing),
            "needed": None if self.needed is None else dict(self.needed),
            "seeds": self.seeds,
            "seeds_allowed": self.seeds_allowed,
            "tokens": self.tokens,
            "heldout_tokens": self.heldout_tokens,
            "notes": list(self.notes),
            "plan_id": self.plan_id,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the verdict that verdict.json holds."""
        deltas = {
            name: Interval(entry["estimate"], entry["low"], entry["high"])
            for name, entry in value["delta"].items()
        }
        same = ("verdict", "sentence", "seeds", "seeds_allowed", "confidence", "tokens")
        more = ("heldout_tokens", "noise", "needed", "plan_id", "provenance")
        return cls(
            **{key: value[key] for key in (*same, *more)},
            before=Interval(**value["R"]["before"]),
            after=Interval(**value["R"]["after"]),
            arms=tuple(
                ArmResult(name=name, delta=deltas.get(name), **entry)
                for name, entry in value["arms"].items()
            ),
            attribution=tuple(
                Attribution.from_json(role, entry)
                for role, entry in value.get("attribution", {}).items()
            ),
            missing=tuple(value["missing"]),
            notes=tuple(value["notes"]),
        )

    def as_text(self) -> str:
        """Return the verdict in words: the sentence, the arms, R, what was written, what next."""
        name = max([16, *(len(arm.name) for arm in self.arms)])
        width = max((len(arm.formats) for arm in self.arms), default=0)
        lines = [self.sentence, ""]
        lines.append(
            f"{'arm':{name}} {'formats':{width}} {'loss':>8} {'delta, nats per token':>30} seeds"
        )
        lines += [
            f"{arm.name:{name}} {arm.formats:{width}} {arm.loss:8.4f} {_delta_text(arm):>30} "
            f"{arm.seeds:5}" + (f"  (as {arm.same_as})" if arm.same_as else "")
            for arm in self.arms
        ]
        lines += [
            "",
            f"R before  {self.before}   (w16a4 over w4a16)",
            f"R after   {self.after}   (the plan's inputs over the plan's weights)",
            f"Intervals are {self.confidence * 100:g}%; {self.tokens:,} training tokens per arm, "
            f"{self.heldout_tokens:,} held-out tokens.",
            *self._settled_text(),
            *self._noise_text(),
            *self.notes,
            *self._attribution_text(),
            "",
            f"{self.run}/{VERDICT_FILE} is up to date"
            if self.up_to_date
            else f"wrote {self.run}/{VERDICT_FILE}, {self.run}/arms/",
            f"next: bitplan report {self.run}",
        ]
        return "\n".join(lines)

    def _settled_text(self) -> list[str]:
        """Say how many of the allowed seeds it took, where not all of them."""
        if self.seeds == self.seeds_allowed:
            return []
        return [f"Settled after {self.seeds} of at most {self.seeds_allowed} seeds."]

    def _noise_text(self) -> list[str]:
        """Say how far apart two bf16 seeds are, and how far a delta is from seed to seed."""
        apart, moves = self.noise.get("bf16_seeds"), self.noise.get("seed_std")
        text = self.noise.get("evaluation_stderr")
        if apart is None or moves is None or text is None:
            return []
        return [
            f"Noise: two bf16 seeds differ by {apart:.4f}; the delta of an arm, paired, by "
            f"{moves:.4f} from seed to seed and {text:.4f} with the held-out text."
        ]

    def _attribution_text(self) -> list[str]:
        """Return a table of what 8 bits at each role alone give back of w4a4's delta."""
        if not self.attribution:
            return []
        head = f"{'role':8} {'its inputs at 8 bits':>28} {'its weights at 8 bits':>28}   R"
        rows = [
            f"{e.role:8} {_signed(e.input):>28} {_signed(e.weight):>28}   {e.R or '-'}"
            for e in self.attribution
        ]
        return ["", "What each role gives back of w4a4's delta, nats per token:", head, *rows]


def _signed(interval: Interval | None) -> str:
    if interval is None or interval.estimate is None:
        return "-"
    if interval.low is None or interval.high is None:
        return f"{interval.estimate:+.4f} [no bounds]"
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _delta_text(arm: ArmResult) -> str:
    return "0" if arm.name == BASELINE and arm.delta is not None else _signed(arm.delta)


def sentence(
    word: Word,
    ratios: Mapping[str, Interval],
    missing: tuple[str, ...],
    needed: Mapping[str, int] | None,
    seeds: int,
) -> str:
    """Say the verdict and what it rests on, or what it lacks, in one sentence."""
    before, after = ratios["before"], ratios["after"]
    low, high = arithmetic.TOLERANCE
    was = f"; before it was {before}" if before.estimate is not None else ""
    if missing:
        return f"undetermined: arms not trained yet: {', '.join(missing)}."
    match word:
        case "converged":
            return (
                f"converged: under the plan the inputs' error is R = {after} times the "
                f"weights', within {low} to {high}{was}."
            )
        case "activation-limited":
            return (
                f"activation-limited: under the plan the inputs still cost R = {after} times "
                f"what the weights do, above {high}{was}."
            )
        case "weight-limited":
            return (
                f"weight-limited: under the plan the inputs cost R = {after} times what the "
                f"weights do, below {low}{was}."
            )
    if after.low is None:
        return (
            f"undetermined: the delta of the plan's weights cannot be told from zero, so R "
            f"({after}) has no bounds{_would_settle(needed, seeds)}{was}."
        )
    return (
        f"undetermined: R = {after} under the plan reaches across a bound of "
        f"{low} to {high}{_would_settle(needed, seeds)}{was}."
    )


def _would_settle(needed: Mapping[str, int] | None, seeds: int) -> str:
    if needed is None:
        return "; no number of seeds on this text would settle it, train longer (--tokens)"
    return (
        f"; about {needed['seeds']} seeds on {needed['heldout_tokens']:,} held-out tokens "
        f"(--seeds {needed['seeds']} --eval-tokens {needed['heldout_tokens']}) would settle it"
    )
