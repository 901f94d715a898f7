"""`bitplan sweep`: the cells of a grid, each trained once, as run directories and one table.

    SWEEP/tokens/                          the text, tokenized once (sweep_tokens.py)
    SWEEP/trunks/NAME/                     what branched cells go on from (sweep_trunk.py)
    SWEEP/runs/NAME/                       a run directory: a model, D, recipe and trunk
        config.json                        the model
        arms/w4a4-g128/seed-0/             a cell, with the files of any arm (record.py)
    SWEEP/sweep.parquet                    all cells that are finished (tables.SWEEP)
    SWEEP/ratios.parquet                   R of each (N, D, G) (sweep_ratios.py)

The grid says what is trained (sweep_grid.py), sweep_work.py trains one cell, and an engine
(sweep_engines.py) hands cells to processes, the longest first. A cell whose configuration has a
record, or a row of sweep.parquet, is never trained again, so a killed sweep goes on, a grid may
grow, and a sweep may begin on one machine and end, from the table alone, on another.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch

from bitplan.demo import EMBEDDED
from bitplan.errors import BitplanError, CheckpointError, DataError
from bitplan.formats import Format
from bitplan.options import SweepOptions
from bitplan.planner.quantizers import ABSMAX, default_quantizer
from bitplan.probe.checkpoint import num_non_embedding_parameters
from bitplan.probe.experts import unfuse_experts
from bitplan.probe.loading import fresh_model, is_causal, quiet, read_config, read_tokenizer
from bitplan.probe.modules import find_linears
from bitplan.qat.law_runs import RUNS, read_sweep
from bitplan.qat.start import Start
from bitplan.qat.sweep_engines import open_engine
from bitplan.qat.sweep_grid import PRECISIONS, Cell, Grid, Shape, Trunk, read_grid
from bitplan.qat.sweep_progress import Progress
from bitplan.qat.sweep_ratios import read_ratios
from bitplan.qat.sweep_result import Run, Sweep
from bitplan.qat.sweep_tokens import Tokens, read_tokens, tokenize_once
from bitplan.qat.sweep_trunk import TRUNKS, Point, trunk_recipe
from bitplan.qat.sweep_work import Task, failure, work
from bitplan.rundir import RunDir, content_hash
from bitplan.sites import OPERANDS, PLANNED_ROLES, Linear, Site
from bitplan.tables import RATIOS, SWEEP

STAGE = "sweep"
TOKENS = "tokens"
CONFIG_FILE = "config.json"


def run_sweep(grid_file: Path, output: Path, options: SweepOptions) -> Sweep:
    """Train the cells of a grid that are not finished, and write OUTPUT/sweep.parquet.

    Raises BitplanError for a grid that cannot be trained, before anything is; a cell whose training
    fails is in the result.
    """
    grid = read_grid(grid_file)
    directory = RunDir.create(output.resolve())
    with directory.lock(), open_engine(options) as engine:
        if not directory.manifest["stages"]:  # a killed sweep is found again by its manifest
            directory.finish(STAGE, {"grid": str(grid_file)}, [])
        vocabulary, read = _text(grid, directory.path / TOKENS)
        shapes = dict.fromkeys(cell.shape for cell in grid.cells)
        models = {shape: _model(shape, vocabulary, grid.seq_len) for shape in shapes}
        for cell in grid.cells:
            _formats(cell, models[cell.shape])  # raises, before text is tokenized
        tokens = _checked(grid, read())
        tasks: dict[str, Task] = {}
        for cell in grid.cells:
            task = _task(cell, models[cell.shape], directory.path, tokens, engine.device)
            tasks.setdefault(task.config_hash, task)  # equal configurations are one training
        before = read_sweep(directory.path)
        arms = _left(list(tasks.values()), before)
        left, needs = _in_order(_points(arms), arms)
        progress = Progress(left, engine.at_once, before)
        found = Sweep(
            path=str(output),
            runs=_runs(list(tasks.values()), arms),
            trunks={p.name: p.num_tokens for p in left if isinstance(p, Point)},
            seconds_left=progress.seconds_left,
            dry_run=options.dry_run,
        )
        if options.dry_run:
            return found
        by_identity = {model.identity: model for model in models.values()}
        for each in left:
            _prepare(each, by_identity[each.start.identity])
        if left:
            engine.run(left, work, progress.done, needs)
        failed = {task.name: why for task in arms if (why := failure(task))}
        table = read_sweep(directory.path)
        directory.write_table(SWEEP.file, table)
        directory.write_table(RATIOS.file, read_ratios(directory.path, table))
        directory.finish(STAGE, {"grid": str(grid_file)}, [SWEEP.file, RATIOS.file])
    return replace(found, failed=failed)


def _left(tasks: Sequence[Task], before: pl.DataFrame) -> list[Task]:
    """Return the cells that are not finished, by what is in tables.SWEEP.

    Arms of one point have to begin from the same weights. Those of others than are here count for
    nothing; where none are here and an arm is missing, the trunk is trained again, and all are.
    """
    known = dict(before.select("config_hash", "trunk").iter_rows())
    groups: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        groups[task.trunk.key if task.trunk else ""].append(task)
    left = []
    for group in groups.values():
        trunk = group[0].trunk
        weights = None if trunk is None else trunk.weights_hash()
        begun = {known[task.config_hash] for task in group if task.config_hash in known}
        if trunk is not None and weights is None:
            is_whole = len(begun) == 1 and all(task.config_hash in known for task in group)
            weights = begun.pop() if is_whole else ""
        left += [
            task
            for task in group
            if task.config_hash not in known or known[task.config_hash] != weights
        ]
    return left


def _points(arms: Sequence[Task]) -> list[Point]:
    """Return the points that arms need and that are not there, each going on from one before."""
    asked = {arm.trunk.key: arm.trunk for arm in arms if arm.trunk}
    found, reached = [], dict[Path, int]()
    for point in sorted(asked.values(), key=lambda point: point.steps):
        if not point.is_finished():
            found.append(replace(point, since=reached.get(point.run, 0)))
        reached[point.run] = point.steps
    return found


def _in_order(
    points: Sequence[Point], arms: Sequence[Task]
) -> tuple[list[Task | Point], dict[int, int]]:
    """Return all tasks, those first after which most is to do, and the number each waits for."""
    tasks: list[Task | Point] = [*points, *arms]
    keys = {task.key for task in tasks}
    needed: dict[str, str] = {}
    for arm in arms:
        if arm.trunk is not None and arm.trunk.key in keys:
            needed[arm.key] = arm.trunk.key
    for point in points:
        for before in points:
            if (before.run, before.steps) == (point.run, point.since):
                needed[point.key] = before.key
    work_after = {task.key: 0 for task in tasks}
    for task in reversed(tasks):  # arms before points, and points from the last one back
        work_after[task.key] += task.num_tokens * task.params
        if (key := needed.get(task.key)) is not None:
            work_after[key] = max(work_after[key], work_after[task.key])
    tasks.sort(key=lambda task: work_after[task.key], reverse=True)
    number = {task.key: n for n, task in enumerate(tasks)}
    return tasks, {number[key]: number[first] for key, first in needed.items()}


def _runs(tasks: Sequence[Task], left: Sequence[Task]) -> tuple[Run, ...]:
    """Return what the grid asks of each run directory."""
    missing = Counter(task.run for task in left)
    asked = Counter(task.run for task in tasks)
    one = {task.run: task for task in tasks}
    return tuple(
        Run(
            name=run.name,
            params=one[run].params,
            tokens=one[run].num_tokens,
            trunk_tokens=one[run].trunk_tokens,
            steps=one[run].recipe.steps,
            cells=count,
            left=missing[run],
        )
        for run, count in asked.items()
    )


@dataclass(frozen=True)
class _Model:
    """What a grid asks of a model: its config as a file, N, and the linears that are quantized."""

    config: Mapping[str, Any]
    params: int
    linears: tuple[Linear, ...]

    @property
    def identity(self) -> str:
        """A hash of what its random weights follow from, beside the seed."""
        return content_hash({"from_scratch": self.config})


def _text(grid: Grid, place: Path) -> tuple[int, Callable[[], Tokens]]:
    """Return the size of the vocabulary, and what gives the tokens that all cells share."""
    lengths = {"eval_tokens": grid.eval_tokens, "seq_len": grid.seq_len}
    if grid.tokenized is not None:
        tokens = read_tokens(grid.tokenized, **lengths)
        return tokens.vocabulary, lambda: tokens
    source = grid.tokenizer or str(EMBEDDED)
    with quiet():
        tokenizer = read_tokenizer(Path(source), source, {})
    return len(tokenizer), lambda: tokenize_once(place, grid.data, tokenizer, **lengths)


def _checked(grid: Grid, tokens: Tokens) -> Tokens:
    """Return the tokens; raise DataError where they are too few for the grid."""
    there = tokens.train_tokens // grid.seq_len * grid.seq_len
    if grid.longest > there and not (grid.repeat and there):
        raise DataError(
            f"the grid trains on up to {grid.longest:,} tokens, and the training part of "
            f"{tokens.source} has {there:,}: give more text, or repeat = true"
        )
    return tokens


def _model(shape: Shape, vocabulary: int, seq_len: int) -> _Model:
    """Return a model of the grid, its weights not drawn; raise CheckpointError where it is none."""
    if isinstance(shape.config, Path):
        if not shape.config.is_file():
            raise CheckpointError(f"model {shape.name}: there is no {shape.config}")
        with quiet():
            config = read_config(shape.config, str(shape.config), {})
    else:
        config = _llama(dict(shape.config), vocabulary, seq_len)
    if not is_causal(config):
        raise CheckpointError(f"model {shape.name}: {config.model_type} predicts no next token")
    text = config.get_text_config()
    if text.vocab_size < vocabulary:
        raise CheckpointError(
            f"model {shape.name}: a vocabulary of {text.vocab_size}, and the tokenizer has "
            f"{vocabulary} tokens: set vocab_size to at least that"
        )
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise BitplanError(f"seq_len {seq_len} is more than {limit} of model {shape.name}")
    with torch.device("meta"):
        model = fresh_model(config)
        unfuse_experts(model)
    written = json.loads(config.to_json_string())
    return _Model(
        config={k: v for k, v in written.items() if k != "transformers_version"},
        params=num_non_embedding_parameters(model),
        linears=tuple(
            item.linear for item in find_linears(model) if item.linear.role in PLANNED_ROLES
        ),
    )


def _llama(row: Mapping[str, int], vocabulary: int, seq_len: int) -> Any:
    """Return the config of a row of the Llama family; embeddings are tied."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=row["layers"],
        hidden_size=row["hidden"],
        intermediate_size=row["ffn"],
        num_attention_heads=row["heads"],
        num_key_value_heads=row["kv_heads"],
        vocab_size=vocabulary,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
    )


def _task(cell: Cell, model: _Model, sweep: Path, tokens: Tokens, device: str) -> Task:
    sequences = cell.recipe.steps * cell.recipe.batch_size
    trunk = None if cell.trunk is None else _point(cell, cell.trunk, model, sweep, tokens, device)
    after = None if trunk is None else trunk.read
    branch: dict[str, Any] = {}
    if trunk is not None:
        branch = {"trunk": {"tokens": trunk.trunk_tokens, "config_hash": trunk.trunk_hash}}
    facts = [model.identity, asdict(cell.recipe), tokens.train, tokens.heldout, *branch.values()]
    of_trunk = "" if trunk is None else f"-t{trunk.trunk_tokens}"
    name = f"{cell.shape.name}{of_trunk}-d{cell.tokens}-{content_hash(facts)[:8]}"
    run = sweep / RUNS / name
    formats = _formats(cell, model)
    lengths = {linear.module: linear.in_features for linear in model.linears}
    quantizers = {
        site: quantizer
        for site, fmt in formats.items()
        if (quantizer := default_quantizer(fmt, site.operand, lengths[site.module])) != ABSMAX
    }
    return Task(
        run=run,
        start=Start(source=str(run), identity=model.identity, is_checkpoint=False),
        arm=cell.arm,
        seed=cell.seed,
        formats=formats,
        quantizers=quantizers,
        recipe=cell.recipe,
        tokens=tokens,
        params=model.params,
        context={
            "model": model.identity,
            "from_scratch": True,
            "train": tokens.order_hash(sequences, cell.seed, after),
            "heldout": tokens.heldout,
            "tokenizer": tokens.tokenizer,
            "device": device,
            **branch,
        },
        trunk=trunk,
    )


def _point(
    cell: Cell, trunk: Trunk, model: _Model, sweep: Path, tokens: Tokens, device: str
) -> Point:
    """Return the point of a trunk that a cell goes on from."""
    recipe = trunk_recipe(cell.recipe, trunk.warmup_steps)
    context = {
        "model": model.identity,
        "train": tokens.order_hash(0, trunk.seed),  # of any length
        "tokenizer": tokens.tokenizer,
        "device": device,
    }
    name = content_hash([asdict(recipe), trunk.seed, context])[:8]
    run = sweep / TRUNKS / f"{cell.shape.name}-{name}"
    return Point(
        run=run,
        start=Start(source=str(run), identity=model.identity, is_checkpoint=False),
        seed=trunk.seed,
        recipe=recipe,
        steps=trunk.steps,
        tokens=tokens,
        params=model.params,
        context=context,
    )


def _formats(cell: Cell, model: _Model) -> dict[Site, Format]:
    """Return the formats of a cell's sites; raise BitplanError where groups do not divide rows."""
    formats = {}
    for linear in model.linears:
        for operand in OPERANDS:
            fmt = PRECISIONS[cell.precision].format(linear.role, operand, cell.group_size)
            if fmt is None:
                continue
            if fmt.group_size is not None and linear.in_features % fmt.group_size:
                raise BitplanError(
                    f"group size {fmt.group_size} does not divide the {linear.in_features} inputs "
                    f"of {linear.module} of model {cell.shape.name}"
                )
            formats[linear.site(operand)] = fmt
    return formats


def _prepare(task: Task | Point, model: _Model) -> None:
    """Make a task's run directory where it is not there."""
    run, tokens = RunDir.create(task.run), task.tokens
    if not run.manifest["stages"]:
        facts = {
            "source": task.run.name,
            "content_hash": model.identity,
            "family": model.config["model_type"],
            "architecture": model.config["architectures"][0],
            "num_non_embedding_parameters": model.params,
            "weights_note": None,
        }
        data = {"source": tokens.source, "content_hash": tokens.text}
        run.finish(STAGE, {"recipe": asdict(task.recipe)}, [], model=facts, data=data)
    if not (run.path / CONFIG_FILE).is_file():
        run.write_json(CONFIG_FILE, model.config)
