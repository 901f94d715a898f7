"""`bitplan sweep`: the cells of a grid, each trained once, as run directories and one table.

    SWEEP/tokens/                          the text, tokenized once (sweep_tokens.py)
    SWEEP/runs/NAME/                       a run directory: a model, D and recipe
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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from bitplan.qat.sweep_grid import PRECISIONS, Cell, Grid, Shape, read_grid
from bitplan.qat.sweep_progress import Progress
from bitplan.qat.sweep_ratios import read_ratios
from bitplan.qat.sweep_result import Run, Sweep
from bitplan.qat.sweep_tokens import Tokens, read_tokens, tokenize_once
from bitplan.qat.sweep_work import Task, work
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
        tokens = _tokens(grid, directory.path / TOKENS)
        shapes = dict.fromkeys(cell.shape for cell in grid.cells)
        models = {shape: _model(shape, tokens) for shape in shapes}
        tasks: dict[str, Task] = {}
        for cell in grid.cells:
            task = _task(cell, models[cell.shape], directory.path / RUNS, tokens, engine.device)
            tasks.setdefault(task.config_hash, task)  # equal configurations are one training
        before = read_sweep(directory.path)
        known = set(before["config_hash"])
        left = [task for key, task in tasks.items() if key not in known]
        left.sort(key=lambda task: task.num_tokens * task.params, reverse=True)
        progress = Progress(left, engine.at_once, before)
        found = Sweep(
            path=str(output),
            runs=_runs(list(tasks.values()), left),
            seconds_left=progress.seconds_left,
            dry_run=options.dry_run,
        )
        if options.dry_run:
            return found
        by_identity = {model.identity: model for model in models.values()}
        for task in left:
            _prepare(task, by_identity[task.start.identity])
        if left:
            engine.run(left, work, progress.done)
        failed = {f"{t.run.name}/{t.arm}/seed-{t.seed}": why for t in left if (why := t.failure())}
        table = read_sweep(directory.path)
        directory.write_table(SWEEP.file, table)
        directory.write_table(RATIOS.file, read_ratios(directory.path, table))
        directory.finish(STAGE, {"grid": str(grid_file)}, [SWEEP.file, RATIOS.file])
    return replace(found, failed=failed)


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


def _tokens(grid: Grid, place: Path) -> Tokens:
    """Return the tokens that all cells share; raise DataError where they are too few."""
    if grid.tokenized is not None:
        tokens = read_tokens(grid.tokenized, eval_tokens=grid.eval_tokens, seq_len=grid.seq_len)
    else:
        source = grid.tokenizer or str(EMBEDDED)
        with quiet():
            tokenizer = read_tokenizer(Path(source), source, {})
        tokens = tokenize_once(
            place, grid.data, tokenizer, eval_tokens=grid.eval_tokens, seq_len=grid.seq_len
        )
    there = tokens.train_tokens // grid.seq_len * grid.seq_len
    if grid.longest > there and not (grid.repeat and there):
        raise DataError(
            f"the grid trains on up to {grid.longest:,} tokens, and the training part of "
            f"{tokens.source} has {there:,}: give more text, or repeat = true"
        )
    return tokens


def _model(shape: Shape, tokens: Tokens) -> _Model:
    """Return a model of the grid, its weights not drawn; raise CheckpointError where it is none."""
    if isinstance(shape.config, Path):
        if not shape.config.is_file():
            raise CheckpointError(f"model {shape.name}: there is no {shape.config}")
        with quiet():
            config = read_config(shape.config, str(shape.config), {})
    else:
        config = _llama(dict(shape.config), tokens)
    if not is_causal(config):
        raise CheckpointError(f"model {shape.name}: {config.model_type} predicts no next token")
    text = config.get_text_config()
    if text.vocab_size < tokens.vocabulary:
        raise CheckpointError(
            f"model {shape.name}: a vocabulary of {text.vocab_size}, and the tokenizer has "
            f"{tokens.vocabulary} tokens: set vocab_size to at least that"
        )
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and tokens.seq_len > limit:
        raise BitplanError(f"seq_len {tokens.seq_len} is more than {limit} of model {shape.name}")
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


def _llama(row: Mapping[str, int], tokens: Tokens) -> Any:
    """Return the config of a row of the Llama family; embeddings are tied."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=row["layers"],
        hidden_size=row["hidden"],
        intermediate_size=row["ffn"],
        num_attention_heads=row["heads"],
        num_key_value_heads=row["kv_heads"],
        vocab_size=tokens.vocabulary,
        max_position_embeddings=tokens.seq_len,
        tie_word_embeddings=True,
    )


def _task(cell: Cell, model: _Model, runs: Path, tokens: Tokens, device: str) -> Task:
    sequences = cell.recipe.steps * cell.recipe.batch_size
    name = content_hash([model.identity, asdict(cell.recipe), tokens.train, tokens.heldout])[:8]
    run = runs / f"{cell.shape.name}-d{cell.tokens}-{name}"
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
            "train": tokens.order_hash(sequences, cell.seed),
            "heldout": tokens.heldout,
            "tokenizer": tokens.tokenizer,
            "device": device,
        },
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


def _prepare(task: Task, model: _Model) -> None:
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
