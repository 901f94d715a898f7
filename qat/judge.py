"""From the arms of a run that are finished to its verdict: what their held-out losses say.

The arithmetic is verdict.py's, the words are result.py's. An arm counts where it is finished for
every seed; one that stopped is told with its reason.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from bitplan.formats import short_groups_note
from bitplan.options import VerifyOptions
from bitplan.planner.plan import Plan
from bitplan.probe.checkpoint import Checkpoint
from bitplan.probe.modules import find_linears
from bitplan.probe.text import Corpus
from bitplan.qat import record as files
from bitplan.qat import verdict as arithmetic
from bitplan.qat.arms import ARMS, BASELINE, RATIOS, UNIFORM, Arm, attribution_arms
from bitplan.qat.job import Job
from bitplan.qat.result import ArmResult, Attribution, Verdict, sentence
from bitplan.qat.verdict import Floats, Interval, Looks
from bitplan.rundir import RunDir, content_hash
from bitplan.sites import Site
from bitplan.tables import TRAINED


def judge(
    directory: RunDir,
    plan: Plan,
    table: Mapping[str, Arm],
    jobs: Mapping[str, list[Job]],
    checkpoint: Checkpoint,
    corpus: Corpus,
    options: VerifyOptions,
    looks: Looks,
) -> Verdict:
    """Compare the arms that are finished for every seed of `jobs`."""
    records = {
        name: [files.finished(directory, job.arm, job.seed, job.config_hash) for job in of_arm]
        for name, of_arm in jobs.items()
    }
    done = {name: [r for r in found if r] for name, found in records.items() if all(found)}
    losses = {
        name: np.stack([files.heldout_losses(directory, name, job.seed) for job in jobs[name]])
        for name in done
    }
    paired = arithmetic.differences(losses, BASELINE) if BASELINE in losses else {}
    ratios = {
        name: arithmetic.ratio(paired[top], paired[bottom], looks)
        if top in paired and bottom in paired
        else Interval(None, None, None)
        for name, (top, bottom) in RATIOS.items()
    }
    job = jobs[BASELINE][0]
    word = arithmetic.decide(ratios["after"])
    wanted = {BASELINE, *RATIOS["after"]} - set(done)
    missing = tuple(name for name in table if name in wanted)
    needed = None
    if word == "undetermined" and not missing:
        top, bottom = RATIOS["after"]
        # A token is a byte at least: there is no more text than that.
        held = sum(span.end - span.start for span in corpus.splits["heldout"])
        needed = arithmetic.needed(
            paired[top],
            paired[bottom],
            looks,
            # Backward costs two passes.
            training=3 * job.train.numel() / job.heldout.numel(),
            most_text=min(arithmetic.MAX_TEXT, held // job.heldout.numel()),
        )
    more = None
    if needed is not None:
        more = {
            "seeds": needed.seeds,
            "heldout_tokens": needed.text * job.heldout.numel(),
        }
    seeds = len(jobs[BASELINE])
    return Verdict(
        verdict=word,
        sentence=sentence(word, ratios, missing, more, seeds),
        before=ratios["before"],
        after=ratios["after"],
        arms=tuple(
            ArmResult(
                name=name,
                formats=_formats_text(plan, table[name]),
                loss=float(losses[name].mean()),
                delta=arithmetic.delta(paired[name], looks) if paired else None,
                seeds=seeds,
                same_as=done[name][0]["same_as"],
            )
            for name in table
            if name in done
        ),
        missing=tuple(name for name in ARMS if name not in done),
        seeds=seeds,
        seeds_allowed=options.seeds,
        confidence=options.confidence,
        tokens=job.train.numel(),
        heldout_tokens=job.heldout.numel(),
        attribution=_attribution(plan, paired, looks),
        noise=arithmetic.noise(losses, BASELINE, looks),
        needed=more,
        notes=(*_stopped(directory, jobs), *_notes(seeds, plan, checkpoint, corpus, options)),
        plan_id=plan.plan_id,
        provenance=directory.provenance()
        | {"text": {"source": corpus.source, "content_hash": corpus.content_hash}},
    )


def _attribution(plan: Plan, paired: Mapping[str, Floats], looks: Looks) -> tuple[Attribution, ...]:
    """Return what 8 bits give back of w4a4's delta, by role, where its arms are finished."""
    back = {
        key: paired[UNIFORM] - paired[arm.name]
        for key, arm in attribution_arms(plan).items()
        if {UNIFORM, arm.name} <= set(paired)
    }
    found = []
    for role in dict.fromkeys(role for role, _ in back):
        weight, input_ = back.get((role, "weight")), back.get((role, "input"))
        found.append(
            Attribution(
                role=role,
                weight=None if weight is None else arithmetic.delta(weight, looks),
                input=None if input_ is None else arithmetic.delta(input_, looks),
                R=None
                if weight is None or input_ is None
                else arithmetic.ratio(input_, weight, looks),
            )
        )
    return tuple(found)


def with_trained(
    directory: RunDir, jobs: Mapping[str, list[Job]], verdict: Verdict
) -> pl.DataFrame:
    """Return tables.TRAINED with the arms of one operand of this verdict as its last rows."""
    recipe = content_hash([job.config_hash for job in jobs[BASELINE]])
    rows = []
    for arm in verdict.arms:
        formats = jobs[arm.name][0].formats
        operands = {site.operand for site in formats}
        if len(operands) != 1 or arm.delta is None or arm.delta.estimate is None:
            continue
        rows.append(
            {
                "recipe": recipe,
                "operand": operands.pop(),
                "formats": json.dumps({str(site): str(fmt) for site, fmt in formats.items()}),
                "delta": arm.delta.estimate,
                "low": arm.delta.low,
                "high": arm.delta.high,
                "seeds": arm.seeds,
                "tokens": verdict.tokens,
            }
        )
    frames = [TRAINED.frame(rows)]
    if (directory.path / TRAINED.file).is_file():
        frames.insert(0, directory.read_table(TRAINED.file))
    key = ("recipe", "operand", "formats")
    return pl.concat(frames).unique(key, keep="last", maintain_order=True)


def _formats_text(plan: Plan, arm: Arm) -> str:
    """Return an arm's formats with the number of sites of each, `24 int4-g128, 4 int8-g128`."""
    formats = list(arm.formats(plan).values())
    if not formats:
        return "none"
    counts = {str(fmt): formats.count(fmt) for fmt in sorted(set(formats))}
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _stopped(directory: RunDir, jobs: Mapping[str, list[Job]]) -> tuple[str, ...]:
    """Say which trainings stopped, and why."""
    alike: dict[str, list[Job]] = {}
    for job in itertools.chain.from_iterable(jobs.values()):
        alike.setdefault(job.config_hash, []).append(job)
    return tuple(
        f"{' and '.join(job.arm for job in of_one)} could not be trained with seed "
        f"{of_one[0].seed}: {reason}."
        for of_one in alike.values()
        for job in of_one
        if (reason := files.stopped(directory, job.arm, job.seed, job.config_hash))
    )


def _notes(
    seeds: int, plan: Plan, checkpoint: Checkpoint, corpus: Corpus, options: VerifyOptions
) -> tuple[str, ...]:
    notes = []
    if options.from_scratch is not None:
        notes.append(
            f"From scratch: the random weights of {options.from_scratch}, the same for all arms of "
            "a seed."
        )
    if seeds == 1:
        notes.append(
            "One seed: the intervals count the noise of the held-out text alone, not of training."
        )
    if checkpoint.weights_note and options.from_scratch is None:
        notes.append(
            f"The checkpoint's {checkpoint.weights_note}: what the weights cost is on top of that."
        )
    items = {item.linear.module: item for item in find_linears(checkpoint.model)}
    chosen = ((Site.parse(choice.site), choice.format) for choice in plan.sites)
    sites = [(site, fmt) for site, fmt in chosen if site.module in items]
    notes += short_groups_note((fmt, items[site.module].linear.in_features) for site, fmt in sites)
    if options.from_scratch is None:
        model: Any = checkpoint.model
        embedding = model.get_input_embeddings()
        for site, fmt in sites:
            module = items[site.module].module
            if module is embedding or module.weight is not embedding.weight:
                continue
            if site.operand == "weight" and fmt.is_quantized:
                notes.append(
                    f"{site.module} shares its weight with the embedding: it is {fmt} where it "
                    "multiplies and whole where it is looked up"
                )
    return (*notes, *corpus.notes)
