"""`bitplan verify`: train the plan's arms from the checkpoint, and say whether the errors converge.

A shell around three pieces: arms.py says what to train, train.py trains one, judge.py compares what
is finished. Everything on disk goes through the run directory. An arm that is
finished under the same configuration is never trained again, whatever was asked in between: a
killed verify goes on, `--arms` may be given in portions, and a new plan costs only its own arms.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitplan.errors import BitplanError, CheckpointError, DivergedError, PlanError
from bitplan.options import VerifyOptions
from bitplan.planner.plan import Plan, read_plan
from bitplan.planner.quantizers import ABSMAX, HADAMARD, default_quantizer
from bitplan.probe.checkpoint import (
    Checkpoint,
    check_vocabulary,
    load_profiled,
    resolve_device,
)
from bitplan.probe.modules import find_linears
from bitplan.probe.text import Corpus, Split, load_text, tokenize
from bitplan.qat import record as files
from bitplan.qat.arms import (
    ARMS,
    EXTRA_ARMS,
    Arm,
    Formats,
    attribution_arms,
    select_arms,
)
from bitplan.qat.devices import training_devices
from bitplan.qat.job import Job
from bitplan.qat.judge import judge, with_trained
from bitplan.qat.pool import run_tasks
from bitplan.qat.processes import share, together
from bitplan.qat.recipe import Recipe
from bitplan.qat.result import VERDICT_FILE, Verdict
from bitplan.qat.start import Start, from_checkpoint, from_scratch
from bitplan.qat.train import make_accelerator, train_arm
from bitplan.qat.verdict import Looks
from bitplan.rundir import RunDir, content_hash
from bitplan.sites import Linear, Site
from bitplan.tables import TRAINED

STAGE = "verify"
SPREAD = ("gpus", "workers", "accumulate")


def verify_plan(run: Path, options: VerifyOptions) -> Verdict:
    """Train the arms of RUN/plan.json that are not finished, and write RUN/verdict.json.

    Raises PlanError where the plan is for another checkpoint, DataError where the text is too
    short, TrainingError where a training cannot go on; arms finished until then stay. An arm whose
    loss stops being finite is missing in the verdict, which says why.

    Until settled: all arms of three seeds, then of one more at a time, as long as the verdict is
    undetermined. The processes of a launch train each arm together (processes.py), and all return
    the verdict.
    """
    return together(lambda: _verify(run, options), resolve_device(options.device))


def _verify(run: Path, options: VerifyOptions) -> Verdict:
    select_arms(options.arms)  # a wrong name is said before anything is loaded
    recipe = _recipe(options)
    device = resolve_device(options.device)
    devices = training_devices(options, device)
    directory = RunDir.open(run)
    with directory.lock():
        plan = read_plan(directory)
        model = _checked_model(directory, plan)
        corpus = load_text(options.data)
        asked = {
            # How trainings are spread changes none of them.
            **{k: v for k, v in asdict(options).items() if k not in SPREAD},
            "device": str(device),
            "plan": content_hash(plan.as_json()),
            "model": model["content_hash"],
            "text": corpus.content_hash,
        }
        if directory.is_done(STAGE, asked):
            found = Verdict.from_json(directory.read_json(VERDICT_FILE))
            return replace(found, run=str(run), up_to_date=True)
        checkpoint = _load(model, options)
        start = _start(checkpoint, plan, options)
        spared = tuple(attribution_arms(plan).values())
        if options.attribute and not spared:
            raise PlanError(
                f"--attribute puts one role at 8 bits, and the plan may use "
                f"{', '.join(plan.formats)}: plan again with an 8-bit format in --formats"
            )
        # Arms of an earlier --attribute stay in the verdict.
        table = {**ARMS, **EXTRA_ARMS, **{arm.name: arm for arm in spared}}
        jobs = _jobs(plan, table, checkpoint, start, corpus, recipe, options, str(device))
        wanted = (*select_arms(options.arms), *(spared if options.attribute else ()))
        looks = Looks(options.confidence, options.seeds if options.until_settled else None)
        for seeds in looks.seeds() if options.until_settled else (options.seeds,):
            looked_at = {name: of_arm[:seeds] for name, of_arm in jobs.items()}
            _train(directory, start, looked_at, wanted, options, devices)
            verdict = judge(directory, plan, table, looked_at, checkpoint, corpus, options, looks)
            if verdict.verdict != "undetermined":
                break
        directory.write_json(VERDICT_FILE, verdict.as_json())
        directory.write_table(TRAINED.file, with_trained(directory, looked_at, verdict))
        written = [
            name
            for arm in verdict.arms
            for k in range(verdict.seeds)
            for name in files.arm_files(arm.name, options.seed + k)
        ]
        directory.finish(STAGE, asked, [VERDICT_FILE, TRAINED.file, *written])
    return replace(verdict, run=str(run))


def _recipe(options: VerifyOptions) -> Recipe:
    """Return the recipe the options spell; raise BitplanError where they contradict each other."""
    if options.steps is not None and options.tokens is not None:
        raise BitplanError(
            f"--steps {options.steps} and --tokens {options.tokens} both say how long to train: "
            "give one of them"
        )
    usual = options.SCRATCH_LR if options.from_scratch else options.DEFAULT_LR
    lr = usual if options.lr is None else options.lr
    if not lr > 0:
        raise BitplanError(f"--lr {lr:g}: a learning rate is above 0")
    step_tokens = options.batch_size * options.seq_len
    steps = options.steps or -(-(options.tokens or options.DEFAULT_TOKENS) // step_tokens)
    return Recipe(
        steps=steps,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        lr=lr,
        schedule=options.schedule,
        average_tail=options.average_tail,
        compiled=options.compiled,
    )


def _checked_model(directory: RunDir, plan: Plan) -> Mapping[str, Any]:
    """Return the manifest's `model`; raise PlanError where the plan was made for another."""
    model: Mapping[str, Any] = directory.manifest.get("model") or {}
    made_for = (plan.provenance.get("model") or {}).get("content_hash")
    if made_for is None or made_for != model.get("content_hash"):
        raise PlanError(
            f"the plan was made for another checkpoint: plan {str(made_for)[:8]}, "
            f"this run {str(model.get('content_hash'))[:8]}; run `bitplan plan {directory.path}`"
        )
    return model


def _load(model: Mapping[str, Any], options: VerifyOptions) -> Checkpoint:
    """Load the run's checkpoint and check that it is still the one, and can be trained so."""
    checkpoint = load_profiled(model, device="cpu", trust_remote_code=options.trust_remote_code)
    if not checkpoint.has_loss:
        raise CheckpointError(
            f"{model['source']} ({type(checkpoint.model).__name__}) predicts no next token: "
            "verify trains causal language models"
        )
    return checkpoint


def _start(checkpoint: Checkpoint, plan: Plan, options: VerifyOptions) -> Start:
    """Return what the arms start from, after checking that it takes the sequences asked for."""
    if options.from_scratch is None:
        start = from_checkpoint(checkpoint, trust_remote_code=options.trust_remote_code)
    else:
        start = from_scratch(options.from_scratch, checkpoint, plan)
    config: Any = start.model(options.seed).config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and options.seq_len > limit:
        raise BitplanError(
            f"--seq-len {options.seq_len} is more than the {limit} positions of {start.source}"
        )
    return start


def _jobs(
    plan: Plan,
    table: Mapping[str, Arm],
    checkpoint: Checkpoint,
    start: Start,
    corpus: Corpus,
    recipe: Recipe,
    options: VerifyOptions,
    device: str,
) -> dict[str, list[Job]]:
    """Return every arm's jobs, one per seed; seeds differ in their batches, arms do not."""
    tokens = recipe.tokens

    def ids(
        split: Split, count: int, seed: int, *, batch_size: int = 1, apart: bool = False
    ) -> Tensor:
        drawn = tokenize(
            corpus,
            checkpoint.tokenizer,
            split,
            tokens=count,
            seq_len=recipe.seq_len,
            seed=seed,
            batch_size=batch_size,
            apart=apart,
        )
        # The profile met other text, and from scratch this is another model.
        check_vocabulary(start.model(options.seed), drawn, start.source)
        return drawn

    # One seed for all, and not the first of the seeds: more seeds later meet the same text. Apart:
    # windows of one text are alike, and tell less for as many tokens.
    heldout = ids("heldout", options.eval_tokens, 0, apart=True)
    linears = {item.linear.module: item.linear for item in find_linears(checkpoint.model)}
    seeds = range(options.seed, options.seed + options.seeds)
    train = {seed: ids("train", tokens, seed, batch_size=recipe.batch_size) for seed in seeds}
    return {
        arm.name: [
            Job(
                arm=arm.name,
                seed=seed,
                formats=(formats := arm.formats(plan)),
                quantizers=_quantizers(plan, arm, formats, linears),
                recipe=recipe,
                train=train[seed],
                heldout=heldout,
                accumulate=options.accumulate,
                context={
                    "model": start.identity,
                    "from_scratch": options.from_scratch is not None,
                    "train": _hash(train[seed]),
                    "heldout": _hash(heldout),
                    "device": device.partition(":")[0],
                },
            )
            for seed in seeds
        ]
        for arm in table.values()
    }


def _quantizers(
    plan: Plan, arm: Arm, formats: Formats, linears: Mapping[str, Linear]
) -> dict[Site, str]:
    """Return the sites whose scales an arm trains: as it or the plan names them, or by default."""
    found = {
        site: (HADAMARD if linears[site.module].role == arm.rotated else None)
        or plan.quantizers.get(str(site))
        or default_quantizer(fmt, site.operand, linears[site.module].in_features)
        for site, fmt in formats.items()
        if site.module in linears  # convert refuses the others
    }
    return {site: name for site, name in found.items() if name != ABSMAX}


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class _Task:
    """One training, as another process can run it."""

    run: Path
    start: Start
    job: Job


def _work(task: _Task, device: str) -> None:
    """Train one arm, in all processes of a launch; one that diverges leaves a note of it."""
    share(_train_task, task, device)


def _train_task(task: _Task, device: str) -> None:
    model = task.start.model(task.job.seed)
    accelerator = make_accelerator(torch.device(device))
    with contextlib.suppress(DivergedError):
        train_arm(RunDir.open(task.run), model, task.job, accelerator)


def _train(
    directory: RunDir,
    start: Start,
    jobs: Mapping[str, list[Job]],
    arms: tuple[Arm, ...],
    options: VerifyOptions,
    devices: list[str],
) -> None:
    """Train what is not finished, seed by seed; arms of equal configurations once."""
    twins: dict[str, list[Job]] = {}
    for job in itertools.chain.from_iterable(jobs.values()):
        twins.setdefault(job.config_hash, []).append(job)
    # Seed by seed: a killed verify leaves whole seeds.
    by_seed = zip(*(jobs[arm.name] for arm in arms), strict=True)
    asked = list(itertools.chain.from_iterable(by_seed))
    tasks: dict[str, _Task] = {}
    for job in asked:
        if _record_of(directory, job, twins) is None:
            tasks.setdefault(job.config_hash, _Task(directory.path, start, job))
    if tasks:
        run_tasks(list(tasks.values()), devices, _work, "trainings")
    for job in asked:
        record = _record_of(directory, job, twins)
        if record is not None and (record["arm"], record["seed"]) != (job.arm, job.seed):
            files.copy_arm(directory, record, job.arm)


def _record_of(
    directory: RunDir, job: Job, twins: Mapping[str, list[Job]]
) -> dict[str, Any] | None:
    """Return the record of a finished training of a job, its own where there is one."""
    alike = (job, *twins[job.config_hash])
    records = (files.finished(directory, j.arm, j.seed, j.config_hash) for j in alike)
    return next(filter(None, records), None)
