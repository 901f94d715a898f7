"""`bitplan plan --measure`: what a plan costs whole, and its refinement by what was measured.

The plan's sites are quantized all at once, in forward passes over the tokens of the profile. Then
single moves near the decision are measured in its place (planner/refine.py), the exact search runs
again around the plan with them, and its answer is measured and taken if its KL is lower; and so on
until the search stays where it is, nothing improves, or the number of plans asked for is used up.
Plans are compared by KL, which is far quieter than the loss. Agreement with the prediction is no
reason to stop: losses that do not add up can cancel.

measured.parquet keeps every plan that was measured, so that nothing is measured twice and a kill
loses a pass. It is bound to the model and the tokens; rows of others are dropped.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from bitplan.errors import DataError, PlanError
from bitplan.options import PlanOptions
from bitplan.planner.budgets import Limit
from bitplan.planner.plan import Measured
from bitplan.planner.problem import Ints, Problem
from bitplan.planner.refine import Move, around, moved, near_moves, stderr_of
from bitplan.planner.search import best
from bitplan.planner.stage import Checked, PlanResult, make_plan
from bitplan.probe.checkpoint import Checkpoint, load_profiled
from bitplan.probe.interventions import Effect, Intervention, measure_interventions
from bitplan.probe.modules import find_linears
from bitplan.probe.text import load_text, tokenize
from bitplan.rundir import RunDir, content_hash
from bitplan.sites import Site
from bitplan.tables import MEASURED, PROFILE

STDERRS = 2.0


def make_measured_plan(run: Path, options: PlanOptions) -> PlanResult:
    """Plan as `make_plan`, then measure the plan whole and refine it, with `options.measure` plans.

    Raises PlanError where the run has nothing to predict or measure with, or its model changed,
    CheckpointError where the model is gone, DataError where the text is another.
    """
    return make_plan(run, options, check)


def check(
    directory: RunDir,
    problem: Problem,
    limits: Sequence[Limit],
    choice: Ints,
    options: PlanOptions,
) -> Checked:
    """Measure a choice [S] whole; refine it where the planner was free to choose.

    Arguments and what it raises: see `make_measured_plan`.
    """
    if not (problem.in_nats and problem.has_inputs):
        raise PlanError(
            "--measure compares with predicted losses on the profile's text, and this run has no "
            "sensitivity.parquet: profile without --weights-only and --no-sensitivity"
        )
    bench = _Bench(directory, problem, options.measure)
    (first,) = bench.measure([choice])
    notes = [_comparison(problem, choice, first)]
    free = options.rule is None and not options.converge
    if free and options.measure > 2:  # the plan, a move, and the answer
        choice, last, said = _refined(bench, limits, choice, first)
        notes.extend(said)
        if last is not first:
            notes.append(_comparison(problem, choice, last))
        first = last
    notes.append(f"plans measured whole: {len(bench.used)}, kept in {MEASURED.file}")
    return Checked(
        choice=choice,
        measured=Measured(**first, agrees=_agrees(problem, choice, first)),
        notes=tuple(notes),
    )


def _refined(
    bench: "_Bench", limits: Sequence[Limit], choice: Ints, whole: dict[str, Any]
) -> tuple[Ints, dict[str, Any], list[str]]:
    """Return the refined choice, what it costs, and a note of how it was found."""
    problem, start = bench.problem, whole
    rounds = 0
    while bench.left > 1:
        # Half of what is left goes into this round, the last of it into its answer.
        moves = near_moves(problem, choice, limits, max(1, bench.left // 2))
        effects = bench.measure([moved(problem, choice, move) for move in moves])
        found: dict[Move, float] = {
            move: effect["kl"] - whole["kl"] for move, effect in zip(moves, effects, strict=True)
        }
        answer = best(around(problem, choice, found), limits).choice
        if np.array_equal(answer, choice) or not bench.left:
            break
        (after,) = bench.measure([answer])
        if after["kl"] >= whole["kl"]:
            break
        choice, whole, rounds = answer, after, rounds + 1
    if rounds == 0:
        said = "refined: no change near the decision lowers the measured KL, the plan stays"
    else:
        said = (
            f"refined in {rounds} rounds: measured KL {start['kl']:.5f} before, "
            f"{whole['kl']:.5f} after"
        )
    return choice, whole, [said]


def _agrees(problem: Problem, choice: Ints, whole: dict[str, Any]) -> bool:
    return abs(_difference(problem, choice, whole)) <= _interval(problem, choice, whole)


def _difference(problem: Problem, choice: Ints, whole: dict[str, Any]) -> float:
    predicted = problem.objective[np.arange(len(choice)), choice].sum()
    return float(whole["delta_loss"] - predicted)


def _interval(problem: Problem, choice: Ints, whole: dict[str, Any]) -> float:
    return STDERRS * math.hypot(stderr_of(problem, choice), whole["stderr"] or 0.0)


def _comparison(problem: Problem, choice: Ints, whole: dict[str, Any]) -> str:
    difference, interval = _difference(problem, choice, whole), _interval(problem, choice, whole)
    verdict = (
        "they agree"
        if abs(difference) <= interval
        else "they disagree: the losses of these sites do not add up, and the measured one counts"
    )
    return (
        f"measured whole, the loss changes by {whole['delta_loss']:+.5f}, {difference:+.5f} beside "
        f"what was predicted, within +-{interval:.5f} of two standard errors: {verdict}"
    )


class _Bench:
    """Measures choices of a run's problem whole, and keeps them in measured.parquet."""

    def __init__(self, directory: RunDir, problem: Problem, count: int) -> None:
        self.problem = problem
        self.used: set[str] = set()
        self._count = count
        self._directory = directory
        manifest = directory.manifest
        self._asked: dict[str, Any] = manifest["stages"]["profile"]["options"]
        self._model: dict[str, Any] = manifest["model"]
        self._data: dict[str, Any] = manifest["data"]
        keys = ("content_hash", "tokens", "seq_len")
        self._of = content_hash(
            [self._model["content_hash"], manifest["seed"], *(self._data[key] for key in keys)]
        )
        known = MEASURED.frame(())
        if (directory.path / MEASURED.file).is_file():
            known = directory.read_table(MEASURED.file)
        self._table = known.filter(of=self._of)

    @property
    def left(self) -> int:
        """How many plans may still be measured."""
        return self._count - len(self.used)

    def measure(self, choices: Sequence[Ints]) -> list[dict[str, Any]]:
        """Return what each choice [S] costs: the measurements among the fields of `Measured`."""
        ids = [self._plan_id(choice) for choice in choices]
        self.used.update(ids)
        todo = {i: c for i, c in zip(ids, choices, strict=True) if i not in self._known()}
        if todo:
            checkpoint, tokens = self._opened
            items = find_linears(checkpoint.model)
            plans = [Intervention(i, self._formats(choice)) for i, choice in todo.items()]
            for effects in measure_interventions(checkpoint.model, items, tokens, plans):
                rows = MEASURED.frame(self._row(effect) for effect in effects)
                self._table = pl.concat([self._table, rows])
                self._directory.write_table(MEASURED.file, self._table)
        known = self._known()
        return [known[i] for i in ids]

    def _known(self) -> dict[str, dict[str, Any]]:
        names = ("delta_loss", "stderr", "kl", "kl_stderr", "tokens")
        rows = self._table.to_dicts()
        return {row["plan_id"]: {name: row[name] for name in names} for row in rows}

    def _row(self, effect: Effect) -> dict[str, Any]:
        names = ("delta_loss", "stderr", "kl", "kl_stderr")
        values = {name: getattr(effect, name) for name in names}
        name = effect.intervention.name
        return {"plan_id": name, "of": self._of, "tokens": self._data["tokens"], **values}

    def _plan_id(self, choice: Ints) -> str:
        formats = self.problem.formats
        pairs = zip(self.problem.sites, choice.tolist(), strict=True)
        return content_hash({site.site: str(formats[f]) for site, f in pairs})

    def _formats(self, choice: Ints) -> dict[Site, Any]:
        """Return the sites that a choice quantizes, but for experts that no token reaches."""
        silent = {site.module for site in self.problem.sites if site.tokens == 0}
        return {
            Site.parse(site.site): self.problem.formats[f]
            for site, f in zip(self.problem.sites, choice.tolist(), strict=True)
            if self.problem.formats[f].is_quantized and site.module not in silent
        }

    @cached_property
    def _opened(self) -> tuple[Checkpoint, Tensor]:
        """Load the run's checkpoint and text, and check that they are still the same."""
        checkpoint = load_profiled(
            self._model,
            device=self._asked["device"],
            trust_remote_code=self._asked["trust_remote_code"],
        )
        corpus = load_text(tuple(self._asked["data"]))
        if corpus.content_hash != self._data["content_hash"]:
            raise DataError(
                f"{corpus.source} has changed since the model was profiled on it: then "
                f"{self._data['content_hash'][:8]}, now {corpus.content_hash[:8]}; "
                f"profile again, so that {PROFILE.file} and what is measured are of one text"
            )
        ids = tokenize(
            corpus,
            checkpoint.tokenizer,
            "calibration",
            tokens=self._asked["tokens"],
            seq_len=self._asked["seq_len"],
            seed=self._asked["seed"],
        )
        return checkpoint, ids
