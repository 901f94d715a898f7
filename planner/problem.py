"""What there is to decide: sites, candidate formats, and what each choice costs, as arrays.

Axes: site [S], format [F] (the candidates, then bf16), linear [L]. A *choice* is an int array [S]
of format indices. `fixed` holds the format of sites that are not the planner's to decide: pinned
ones, and those of roles outside PLANNED_ROLES, which stay bf16. What is kept at bf16, by role or by
a pin, does not count in any average.
`group` [L] names the linears that decide together: fused ones (q/k/v; gate/up), or, one format per
role, all of a role. Their weights share one format and their inputs share one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bitplan.errors import PlanError
from bitplan.formats import BF16, Format, Operand, parse_formats
from bitplan.planner import predict
from bitplan.planner.pins import Pin, apply_pins
from bitplan.planner.predict import Floats
from bitplan.planner.shares import Share, apply_share, parse_share
from bitplan.sites import OPERANDS, PLANNED_ROLES

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
UNFIXED = -1
ABSENT = -1


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """The facts of one site that planning uses, from its row of profile.parquet."""

    site: str
    module: str
    operand: Operand
    role: str
    block: int | None
    expert: int | None
    fused: str | None
    in_features: int
    out_features: int
    tokens: int | None
    kurtosis: float | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sites, candidate formats and predictions; see the module docstring for the axes."""

    sites: tuple[SiteInfo, ...]
    formats: tuple[Format, ...]
    pins: Mapping[str, Pin]
    allowed: Bools
    """[S, F]: the formats the planner may choose for a site that is not fixed."""
    counted: Bools
    """[S]: whether the site is in the averages: planned roles and pins, but what is pinned bf16."""
    fixed: Ints
    """[S]: the format index of a fixed site, else UNFIXED."""
    group: Ints
    """[L]: linears of one number decide together."""
    linear: Ints
    """[S]: the site's linear."""
    bits: Floats
    """[S, F]: effective bits per element, scales counted."""
    params: Floats
    """[L]: parameters."""
    macs: Floats
    """[L]: multiply-accumulates per token of text; routed experts count as often as they run."""
    relative_error: Floats
    """[S, F]"""
    raw: Floats
    """[S, F]: measured change of loss, nats per token; NaN where there is none."""
    stderr: Floats
    method: NDArray[Any]
    """[S, F]: `gradient`, `intervention` or None."""
    predicted_stderr: Floats
    """[S, F]: the standard error of the predicted change of loss; NaN where it is not known."""
    kl: Floats
    """[S, F]: predicted KL divergence, nats per token; NaN where there is none."""
    predicted: Floats
    """[S, F]: predictions of all that was measured, NaN elsewhere; see predict.py."""
    objective: Floats
    """[S, F]: what is minimized, summed over sites: `predicted` where it is needed, else 0."""
    in_nats: bool
    """Whether `objective` is a loss, or without sensitivities only an order."""
    notes: tuple[str, ...] = ()
    """What was done to the sensitivities on the way to the predictions."""
    shares: Mapping[Share, Sequence[int]]
    """What every choice keeps to, and the sites that each counts."""
    pairs: Bools | None = None
    """[L, F, F]: the (weight, input) formats that a target runs, see constrain.py; None: all."""

    @cached_property
    def is_input(self) -> Bools:
        """[S]: whether the site is an input."""
        return np.array([s.operand == "input" for s in self.sites])

    @property
    def has_inputs(self) -> bool:
        """Whether inputs were profiled: False after `profile --weights-only`."""
        return bool(self.is_input.any())

    def site_of(self, operand: Operand) -> Ints:
        """Return [L]: the linear's site of an operand, or ABSENT."""
        out = np.full(len(self.params), ABSENT)
        mask = self.is_input == (operand == "input")
        out[self.linear[mask]] = np.flatnonzero(mask)
        return out

    def mask(self, operand: Operand) -> Bools:
        """Return [S]: the sites of an operand that count in its average."""
        mask: Bools = self.counted & (self.is_input == (operand == "input"))
        return mask

    @cached_property
    def weight_in_average(self) -> Floats:
        """[S]: the share of a site in the average bits of its operand; sums to 1 for each."""
        size = np.where(self.is_input, self.macs[self.linear], self.params[self.linear])
        out = np.zeros(len(self.sites))
        for operand in OPERANDS:
            mask = self.mask(operand)
            if (total := size[mask].sum()) > 0:
                out[mask] = size[mask] / total
        return out

    def ladder(self, operand: Operand) -> tuple[int, int]:
        """Return the low and the high format of an operand: the cheapest, the cheapest 8-bit one.

        Where no quantized candidate has 8 bits, high is the dearest quantized one.
        """
        cost = np.where(self.mask(operand), self.weight_in_average, 0.0) @ self.bits
        found = np.flatnonzero(self.allowed[self.is_input == (operand == "input")].any(axis=0))
        quantized = [f for f in found.tolist() if self.formats[f].is_quantized]
        order = sorted(quantized or found.tolist(), key=lambda f: (cost[f], f))
        return order[0], next((f for f in order if self.formats[f].bits >= 8), order[-1])


def read_problem(
    profile: pl.DataFrame,
    errors: pl.DataFrame,
    sensitivity: pl.DataFrame | None,
    *,
    formats: Sequence[str],
    pins: Sequence[str] = (),
    per_role: bool = False,
    shares: Sequence[str] = (),
) -> Problem:
    """Build the problem from the tables of a run directory (step 0: the checkpoint).

    Raises PlanError where there is nothing to plan, a pin or a share does not fit, the tables are
    of different checkpoints, or a candidate format was not profiled or has no finite sensitivity.
    """
    rows = profile.filter(pl.col("step") == 0).unique("site", keep="first", maintain_order=True)
    names = [field.name for field in fields(SiteInfo)]
    sites = tuple(SiteInfo(**row) for row in rows.select(names).iter_rows(named=True))
    if not sites:
        raise PlanError("profile.parquet holds no site of a checkpoint (step 0): profile again")
    _check_same_checkpoint(rows, {"errors": errors, "sensitivity": sensitivity})
    pinned = apply_pins(sites, pins)
    candidates = parse_formats(formats)
    quantized = dict.fromkeys([*candidates, *(pin.format for pin in pinned.values())])
    columns = (*(f for f in quantized if f.is_quantized), BF16)
    counted, fixed = _status(sites, pinned, columns)
    linears, linear = _number([s.module for s in sites])
    of_module = {s.module: s for s in reversed(sites)}
    infos = [of_module[module] for module in linears]
    params = np.array([float(s.in_features * s.out_features) for s in infos])
    bare = Problem(
        sites=sites,
        formats=columns,
        pins=pinned,
        allowed=_allowed(sites, candidates, columns),
        counted=counted,
        fixed=fixed,
        group=_number([_decides(s, per_role) for s in infos])[1],
        linear=linear,
        bits=np.array([[f.effective_bits(s.in_features) for f in columns] for s in sites]),
        params=params,
        macs=params * _routed(sites, linear, len(linears)),
        **_NOT_YET,
        in_nats=sensitivity is not None,
        shares={},
        pairs=None,
    )
    bare = replace(bare, shares=_shares(bare, shares))
    return replace(bare, **_predictions(bare, errors, sensitivity))


_PREDICTED = (
    "relative_error",
    "raw",
    "stderr",
    "method",
    "predicted_stderr",
    "kl",
    "predicted",
    "objective",
)
_NOT_YET: dict[str, Any] = dict.fromkeys(_PREDICTED, np.empty((0, 0)))


def _check_same_checkpoint(
    profile: pl.DataFrame, tables: Mapping[str, pl.DataFrame | None]
) -> None:
    for name, table in tables.items():
        if table is None:
            continue
        unknown = table.filter(~pl.col("site").is_in(profile["site"].implode()))["site"].unique()
        if len(unknown):
            raise PlanError(
                f"{name}.parquet has {len(unknown)} sites that profile.parquet lacks "
                f"({unknown.sort()[0]}, ...): it is of another checkpoint; profile again"
            )


def _decides(site: SiteInfo, per_role: bool) -> str:
    """Name the group of linears that a site's linear decides with."""
    if per_role and site.role in PLANNED_ROLES:
        return site.role
    return site.fused or site.module


def _status(
    sites: Sequence[SiteInfo], pinned: Mapping[str, Pin], columns: Sequence[Format]
) -> tuple[Bools, Ints]:
    """Return which sites count in the averages, and the format index of the fixed ones."""
    counted = np.array([s.role in PLANNED_ROLES for s in sites])
    fixed = np.where(counted, UNFIXED, len(columns) - 1)
    for i, site in enumerate(sites):
        if pin := pinned.get(site.site):
            counted[i] = pin.format.is_quantized
            fixed[i] = columns.index(pin.format)
    if not counted.any():
        roles = Counter(s.role for s in sites)
        found = ", ".join(f"{count} of role {role}" for role, count in roles.items())
        raise PlanError(
            f"nothing to plan: no site has a role of {', '.join(PLANNED_ROLES)} and is not pinned "
            f"to bf16; found {found}; include some with --pin ROLE=FORMAT"
        )
    return counted, fixed


def _shares(problem: Problem, texts: Sequence[str]) -> dict[Share, list[int]]:
    """Return the shares and the sites that each counts."""
    names = np.array([str(f) for f in problem.formats])
    fixed = np.arange(len(names)) == problem.fixed[:, None]
    able = np.where((problem.fixed != UNFIXED)[:, None], fixed, problem.allowed)
    open_to = [set(names[row].tolist()) for row in able]
    counted = problem.counted.tolist()
    parsed = dict.fromkeys(map(parse_share, texts))
    return {share: apply_share(share, problem.sites, counted, open_to) for share in parsed}


def _allowed(
    sites: Sequence[SiteInfo], candidates: Sequence[Format], columns: Sequence[Format]
) -> Bools:
    for operand in dict.fromkeys(s.operand for s in sites):
        if not any(f.applies_to(operand) for f in candidates):
            raise PlanError(
                f"no format of {', '.join(map(str, candidates))} applies to {operand}s: "
                "add one with --formats"
            )
    return np.array([[f in candidates and f.applies_to(s.operand) for f in columns] for s in sites])


def _number(names: Sequence[str]) -> tuple[list[str], Ints]:
    """Return the distinct names in order, and the number of each name among them."""
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return list(index), np.array([index[name] for name in names])


def _routed(sites: Sequence[SiteInfo], linear: Ints, linears: int) -> Floats:
    """Return [L]: tokens that reach a linear's input over tokens of text; 0 where it has none."""
    total = max((s.tokens or 0 for s in sites), default=0) or 1
    out = np.zeros(linears)
    for site, number in zip(sites, linear, strict=True):
        if site.operand == "input":
            out[number] = (total if site.tokens is None else site.tokens) / total
    return out


def _predictions(
    problem: Problem, errors: pl.DataFrame, sensitivity: pl.DataFrame | None
) -> dict[str, Any]:
    """Return the prediction arrays; raise PlanError where a format was not profiled."""
    names, columns = [s.site for s in problem.sites], problem.formats
    relative = predict.pivot(errors.filter(pl.col("step") == 0), "relative_error", names, columns)
    relative[:, -1] = 0.0
    needed = _needed(problem)
    raw = np.full_like(relative, np.nan)
    stderr, method = raw.copy(), np.full(raw.shape, None, dtype=object)
    predicted_stderr, kl, notes = raw.copy(), raw.copy(), tuple[str, ...]()
    if sensitivity is None:
        objective = predict.denoise(relative, columns) * problem.weight_in_average[:, None]
    else:
        best = predict.best_method(sensitivity)
        raw = predict.pivot(best, "delta_loss", names, columns)
        stderr = predict.pivot(best, "stderr", names, columns)
        method = predict.pivot_methods(best, names, columns)
        found = predict.predict(sensitivity, names, problem.is_input, columns)
        loss, predicted_stderr, kl, notes = found.loss, found.stderr, found.kl, found.notes
        unrouted = np.array([s.tokens == 0 for s in problem.sites])
        idle = np.isin(problem.linear, problem.linear[unrouted])
        for table in (raw, loss, predicted_stderr, kl):
            table[:, -1] = 0.0
            table[idle] = np.nan_to_num(table[idle], nan=0.0)
        objective = predict.denoise(loss, columns)
    if (lacks := needed & np.isnan(objective)).any():
        what = "relative error" if sensitivity is None else "sensitivity"
        formats = ",".join(str(columns[f]) for f in np.flatnonzero(lacks.any(axis=0)))
        rows = np.flatnonzero(lacks.any(axis=1))
        known = ", ".join(errors["format"].unique(maintain_order=True))
        raise PlanError(
            f"the profile has no {what} for {formats} at {len(rows)} of {len(names)} sites "
            f"({names[rows[0]]}, ...); it has {known}: profile again with --formats {formats} "
            "among them"
        )
    return {
        "relative_error": relative,
        "raw": raw,
        "stderr": stderr,
        "method": method,
        "predicted_stderr": predicted_stderr,
        "kl": kl,
        "notes": notes,
        "predicted": objective,
        "objective": np.where(needed, objective, 0.0),
    }


def _needed(problem: Problem) -> Bools:
    """Return [S, F]: the predictions that some choice may use."""
    pinned = problem.fixed != UNFIXED
    columns = np.arange(len(problem.formats))
    return np.where(pinned[:, None], columns == problem.fixed[:, None], problem.allowed)
