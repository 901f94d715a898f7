"""`bitplan plan RUN --explain SITE`: all that a run knows of a site, and why it got its format.

Reads plan.json and the profile it was made from, and writes nothing. Ranks count the planned sites
of the same operand, from the largest: by the change of loss at the site's cheapest candidate format
(by relative error where no sensitivity was profiled), and by kurtosis.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from textwrap import fill
from typing import Any

import polars as pl

from bitplan.errors import PlanError
from bitplan.formats import Format, parse_formats
from bitplan.planner.pins import matching
from bitplan.planner.plan import PLAN_FILE, Plan, SiteChoice, read_plan
from bitplan.planner.predict import best_method
from bitplan.planner.problem import SiteInfo
from bitplan.rundir import RunDir, file_hash
from bitplan.tables import ERRORS, PROFILE, SENSITIVITY

WIDTH = 100
LABEL = 13
SHOWN = 20
NORMAL_95 = 1.96
STATISTICS = (
    "kurtosis",
    "kurtosis_without_top_tokens",
    "absmax",
    "max_over_median",
    "outlier_share",
)
FORCED = {
    None: "chosen by the planner",
    "role": "forced by its role, which is outside the plan",
    "pin": "forced by a pin",
    "rule": "forced by the rule",
    "share": "forced by a --share, which leaves no other format",
    "budget": "forced by the budget, which leaves no other format",
}


@dataclass(frozen=True, kw_only=True)
class SiteStory:
    """What the run knows of one site."""

    choice: SiteChoice
    in_features: int
    out_features: int
    statistics: Mapping[str, float | None]
    by_format: Sequence[Mapping[str, Any]]
    """Per candidate: format, bits, method, delta_loss, its 95 % interval, kl, relative_error."""
    rank: int | None
    rank_format: str | None
    kurtosis_rank: int | None
    peers: int
    """How many planned sites of the operand the ranks count."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        story = asdict(self)
        return {"site": self.choice.site, **story, "choice": self.choice.as_json()}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The sites that were asked about, in the order of the model."""

    plan: Plan
    stories: tuple[SiteStory, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the plan's id and every site."""
        return {"plan_id": self.plan.plan_id, "sites": [story.as_json() for story in self.stories]}

    def as_text(self) -> str:
        """Return a paragraph per site, of the first SHOWN sites."""
        shown = ["\n".join(_lines(story, self.plan)) for story in self.stories[:SHOWN]]
        if more := len(self.stories) - SHOWN:
            shown += [f"and {more} more sites: --json has all"] if more > 0 else []
        return "\n\n".join(shown)


def explain_sites(run: Path, glob: str) -> Explanation:
    """Return what a run knows of the sites that a glob matches, as a pin's does.

    Raises RunError without a plan or a profile, PlanError where the glob matches nothing or the
    profile is not the one that the plan was made from.
    """
    directory = RunDir.open(run)
    plan = read_plan(directory)
    _check_fresh(directory)
    profile = directory.read_table(PROFILE.file).filter(pl.col("step") == 0)
    profile = profile.unique("site", keep="first", maintain_order=True)
    names = [field.name for field in fields(SiteInfo)]
    sites = [SiteInfo(**row) for row in profile.select(names).iter_rows(named=True)]
    asked = matching(glob, sites, f"--explain {glob!r}")
    measured = (directory.path / SENSITIVITY.file).is_file()
    table = _measurements(
        directory.read_table(ERRORS.file),
        best_method(directory.read_table(SENSITIVITY.file)) if measured else None,
    )
    choices = {choice.site: choice for choice in plan.sites}
    peers = {
        operand: [s for s in sites if s.operand == operand and choices[s.site].planned]
        for operand in ("input", "weight")
    }
    return Explanation(
        plan=plan,
        stories=tuple(
            _story(
                sites[i],
                choices[sites[i].site],
                profile.row(i, named=True),
                parse_formats(plan.formats),
                table,
                peers[sites[i].operand],
            )
            for i in asked
        ),
    )


def _check_fresh(directory: RunDir) -> None:
    """Raise PlanError where a table of the profile is not the one that the plan was made from."""
    made_from = directory.manifest.get("stages", {}).get("plan", {}).get("options", {})
    hashes = made_from.get("inputs", {})
    for name in (table.file for table in (PROFILE, ERRORS, SENSITIVITY) if table.file in hashes):
        path = directory.path / name
        if not path.is_file() or file_hash(path) != hashes[name]:
            raise PlanError(
                f"{path} is not what {PLAN_FILE} was made from: run `bitplan plan "
                f"{directory.path}` again"
            )


Measurements = dict[tuple[str, str], dict[str, Any]]


def _measurements(errors: pl.DataFrame, sensitivity: pl.DataFrame | None) -> Measurements:
    """Return (site, format) to what was measured of it."""
    table: Measurements = {}
    frames: list[tuple[pl.DataFrame, tuple[str, ...]]] = [
        (errors.filter(pl.col("step") == 0), ("relative_error",))
    ]
    if sensitivity is not None:
        frames.append((sensitivity, ("method", "delta_loss", "stderr", "kl")))
    for frame, columns in frames:
        for row in frame.select("site", "format", *columns).iter_rows(named=True):
            table.setdefault((row.pop("site"), row.pop("format")), {}).update(row)
    return table


def _story(
    site: SiteInfo,
    choice: SiteChoice,
    profiled: Mapping[str, Any],
    candidates: Sequence[Format],
    table: Measurements,
    peers: Sequence[SiteInfo],
) -> SiteStory:
    mine = [f for f in candidates if f.applies_to(site.operand)]
    by_format = [
        _measured(f, site, table[site.site, str(f)]) for f in mine if (site.site, str(f)) in table
    ]
    low = min(mine, key=lambda f: f.effective_bits(site.in_features)) if mine else None
    values = {}
    for peer in peers:
        found = table.get((peer.site, str(low)), {})
        values[peer.site] = found.get("delta_loss", found.get("relative_error"))
    return SiteStory(
        choice=choice,
        in_features=site.in_features,
        out_features=site.out_features,
        statistics={name: profiled[name] for name in STATISTICS},
        by_format=by_format,
        rank=_rank(site.site, values),
        rank_format=None if low is None else str(low),
        kurtosis_rank=_rank(site.site, {peer.site: peer.kurtosis for peer in peers}),
        peers=len(peers),
    )


def _measured(f: Format, site: SiteInfo, found: Mapping[str, Any]) -> dict[str, Any]:
    value, stderr = found.get("delta_loss"), found.get("stderr")
    half = None if value is None or stderr is None else NORMAL_95 * stderr
    return {
        "format": str(f),
        "bits": f.effective_bits(site.in_features),
        "method": found.get("method"),
        "delta_loss": value,
        "low": None if value is None or half is None else value - half,
        "high": None if value is None or half is None else value + half,
        "kl": found.get("kl"),
        "relative_error": found.get("relative_error"),
    }


def _rank(site: str, values: Mapping[str, float | None]) -> int | None:
    """Return 1 for the largest; equal ones share a rank, and what is unknown has none."""
    mine = values.get(site)
    if mine is None:
        return None
    return 1 + sum(value is not None and value > mine for value in values.values())


def _lines(story: SiteStory, plan: Plan) -> Iterator[str]:
    c = story.choice
    where = "" if c.block is None else f", block {c.block}"
    yield f"{c.site}  ({c.role}{where}, {story.out_features} x {story.in_features})"
    yield _line("format", f"{c.format}, {c.bits:.4g} bits; {_forced(c, plan)}")
    yield _line("why", c.reason)
    yield _line("statistics", "; ".join(_statistics(story)))
    for found in story.by_format:
        yield _line(found["format"], _sensitivity(found))
    if story.rank is not None:
        of = f"of {story.peers} planned {c.operand}s"
        by = "loss" if any(f["delta_loss"] is not None for f in story.by_format) else "error"
        text = f"{story.rank} {of} by {by} at {story.rank_format}"
        if story.kurtosis_rank is not None:
            text += f", {story.kurtosis_rank} by kurtosis"
        yield _line("rank", text)
    if c.next_best is not None:
        yield _line("next best", _next_best(c, in_nats=plan.predicted.delta_loss is not None))
    if c.kurtosis_misleads:
        yield _line("kurtosis", "misleads here: among the highest, at a cost below the median")


def _line(label: str, text: str) -> str:
    return fill(
        text, WIDTH, initial_indent=f"  {label:<{LABEL}}", subsequent_indent=" " * (LABEL + 2)
    )


def _forced(choice: SiteChoice, plan: Plan) -> str:
    name = f" ({plan.made_by})" if choice.forced == "rule" else ""
    return FORCED[choice.forced] + name


def _statistics(story: SiteStory) -> Iterator[str]:
    s = story.statistics
    if s["kurtosis"] is not None:
        tokens = s["kurtosis_without_top_tokens"]
        rest = "" if tokens is None else f" ({tokens:.3g} without first and top tokens)"
        yield f"kurtosis {s['kurtosis']:.4g}{rest}"
    if s["absmax"] is not None:
        ratio = s["max_over_median"]
        yield f"|x| to {s['absmax']:.4g}" + ("" if ratio is None else f", {ratio:.3g} x the median")
    if s["outlier_share"] is not None:
        yield f"{s['outlier_share']:.2%} beyond 6 sigma"


def _sensitivity(found: Mapping[str, Any]) -> str:
    parts = [f"{found['bits']:.4g} bits"]
    if found["delta_loss"] is not None:
        interval = (
            "" if found["low"] is None else f" (95 %: {found['low']:+.2g} to {found['high']:+.2g})"
        )
        parts.append(f"{found['method']} {found['delta_loss']:+.3g} nats{interval}")
    if found["kl"] is not None:
        parts.append(f"KL {found['kl']:.2g}")
    if found["relative_error"] is not None:
        parts.append(f"relative error {found['relative_error']:.2g}")
    return "; ".join(parts)


def _next_best(choice: SiteChoice, *, in_nats: bool) -> str:
    n = choice.next_best
    assert n is not None
    unit = "nats" if in_nats else "of weighted error"
    return f"{n.format}: {n.delta_loss:+.2g} {unit}, {n.bits:+.3g} average {choice.operand} bits"
