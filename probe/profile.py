"""`bitplan profile`: a checkpoint to profile.parquet, errors.parquet and sensitivity.parquet.

The stage loads a checkpoint, reads calibration text, measures every weight and every input, and
writes the tables together at its end: what fails leaves the run directory as it was. Asked again
with the same options, checkpoint and text, it returns what is there.

A model whose weights in float32 do not fit in memory is run block by block (streamed.py): the same
tables, and where that is interrupted, the parts that were finished wait in the run directory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from bitplan.errors import CheckpointError, DataError
from bitplan.formats import Format, parse_formats
from bitplan.options import ProfileOptions
from bitplan.probe.checkpoint import (
    Checkpoint,
    float32_bytes,
    hash_files,
    identify,
    load_checkpoint,
    open_in_parts,
    resolve_device,
    some,
)
from bitplan.probe.inputs import Inputs, measure_inputs
from bitplan.probe.memory import available_bytes
from bitplan.probe.modules import LinearModule, find_linears
from bitplan.probe.partial import opened_partial, remove_partial
from bitplan.probe.result import ProfileResult
from bitplan.probe.stats import Summary, TensorStats, to_host
from bitplan.probe.streamed import profile_blocks
from bitplan.probe.text import Corpus, load_text, tokenize
from bitplan.probe.weights import (
    gate_up_correlation,
    gate_up_partners,
    open_weights,
    profile_weights,
)
from bitplan.progress import track
from bitplan.rundir import RunDir, content_hash, versions
from bitplan.sites import site_columns
from bitplan.tables import ERRORS, PROFILE, SENSITIVITY

STAGE = "profile"
_EMPTY = {"tokens": 0, "count": 0, "nan_count": 0, "inf_count": 0}


def profile_checkpoint(run: Path, options: ProfileOptions) -> ProfileResult:
    """Profile a checkpoint into a run directory, or return the profile that is there.

    Raises CheckpointError, DataError, FormatError or RunError; nothing is written then.
    """
    formats = parse_formats(options.formats)
    resolve_device(options.device)
    target = RunDir.create(run)
    with target.lock():
        if options.weights_only:
            return _weights_only(target, options, formats)
        corpus = load_text(options.data)
        asked = _asked(options) | {
            "model_hash": identify(options.model, trust_remote_code=options.trust_remote_code),
            "data_hash": corpus.content_hash,
        }
        if target.is_done(STAGE, asked):
            remove_partial(run)
            return _result(target, up_to_date=True)
        return _measure(target, options, asked, formats, corpus)


def _asked(options: ProfileOptions) -> dict[str, Any]:
    """Return the options that the tables depend on."""
    asked = asdict(options)
    del asked["stream"]
    return asked


def _measure(
    target: RunDir,
    options: ProfileOptions,
    asked: Mapping[str, Any],
    formats: Sequence[Format],
    corpus: Corpus,
) -> ProfileResult:
    reason = _why_stream(options)
    device, trusted = options.device, options.trust_remote_code
    parted = None
    if reason is None:
        checkpoint = load_checkpoint(options.model, device=device, trust_remote_code=trusted)
    else:
        checkpoint, parted = open_in_parts(
            options.model,
            device=device,
            trust_remote_code=trusted,
            content_hash=asked["model_hash"],
        )
    ids = _calibration_ids(checkpoint, corpus, options)
    items = find_linears(checkpoint.model)
    wanted = {"has_loss": checkpoint.has_loss, "sensitivity": options.sensitivity}

    def tabulate(
        items: Sequence[LinearModule], inputs: Inputs
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        summaries = _summaries(items, inputs, formats)
        return list(_rows(items, summaries)), list(_error_rows(items, summaries))

    if parted is None:
        inputs = measure_inputs(checkpoint.model, items, ids, formats, **wanted)
        rows, errors = tabulate(items, inputs)
        sensitivity, notes = inputs.sensitivity, inputs.notes
    else:
        question = dict(asked) | {"versions": versions(), "device": str(parted.device)}
        with opened_partial(target.path, content_hash(question)) as partial:
            found = profile_blocks(parted, items, ids, formats, tabulate, partial, **wanted)
        rows, errors = found.rows, found.errors
        sensitivity, notes = found.sensitivity, (str(reason), *found.notes)
    rows = [_with_texts(row, ids, checkpoint.tokenizer) for row in rows]
    frames = {PROFILE.file: PROFILE.frame(rows), ERRORS.file: ERRORS.frame(errors)}
    if sensitivity is not None:
        frames[SENSITIVITY.file] = SENSITIVITY.frame(sensitivity)
    data = {
        "source": corpus.source,
        "content_hash": corpus.content_hash,
        "split": "calibration",
        "tokens": ids.numel(),
        "seq_len": ids.shape[1],
    }
    facts = {"model": checkpoint.facts(), "data": data, "seed": options.seed}
    all_notes = [*_notes(checkpoint, rows, options), *corpus.notes, *notes]
    return _write(target, asked, frames, facts, all_notes)


def _why_stream(options: ProfileOptions) -> str | None:
    """Return why the model is run block by block, as a note, or None where it is loaded whole."""
    if options.stream:
        return "the model was run block by block, as was asked"
    needed = float32_bytes(options.model, trust_remote_code=options.trust_remote_code)
    free = available_bytes(resolve_device(options.device))
    if options.stream is False or needed is None or free is None or needed <= free:
        return None
    return (
        f"the model was run block by block: its weights take {needed / 1e9:.1f} GB in float32, "
        f"{free / 1e9:.1f} GB of memory were free"
    )


def _weights_only(
    target: RunDir, options: ProfileOptions, formats: Sequence[Format]
) -> ProfileResult:
    """Profile the weights of safetensors files alone, which need not fit in memory."""
    files = open_weights(options.model)
    asked = _asked(options) | {"model_hash": hash_files(files.files)}
    if target.is_done(STAGE, asked):
        return _result(target, up_to_date=True)
    records = list(
        track(
            profile_weights(files, formats, resolve_device(options.device)),
            "profiling weights",
            total=len(files.matrices),
        )
    )
    frames = {
        PROFILE.file: PROFILE.frame(record.row for record in records),
        ERRORS.file: ERRORS.frame(row for record in records for row in record.errors),
    }
    embeddings = sum(
        matrix.linear.in_features * matrix.linear.out_features
        for matrix in files.matrices
        if matrix.linear.role in ("embed", "lm_head")
    )
    model = {
        "source": files.source,
        "content_hash": asked["model_hash"],
        "family": files.family,
        "architecture": files.architecture,
        "num_parameters": files.num_parameters,
        "num_non_embedding_parameters": files.num_parameters - embeddings,
        "weights_note": None,
    }
    notes = ["weights only: no inputs and no sensitivity were measured"]
    if files.skipped:
        notes.append(
            f"{len(files.skipped)} tensors are no linears (norms, biases): {some(files.skipped)}"
        )
    return _write(target, asked, frames, {"model": model, "data": None, "seed": None}, notes)


def _calibration_ids(checkpoint: Checkpoint, corpus: Corpus, options: ProfileOptions) -> Tensor:
    """Return the calibration tokens [sequences, seq_len]; raise where they do not fit."""
    model: Any = checkpoint.model
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and options.seq_len > longest:
        raise DataError(
            f"sequences of {options.seq_len} tokens were asked for, {options.model} takes "
            f"{longest} at the most: pass --seq-len {longest}"
        )
    ids = tokenize(
        corpus,
        checkpoint.tokenizer,
        "calibration",
        tokens=options.tokens,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    vocabulary = model.get_input_embeddings().num_embeddings
    if (largest := int(ids.max())) >= vocabulary:
        raise CheckpointError(
            f"{options.model}: its tokenizer writes token {largest}, its embedding has "
            f"{vocabulary}: they do not belong together"
        )
    return ids


def _notes(
    checkpoint: Checkpoint, rows: Iterable[Mapping[str, Any]], options: ProfileOptions
) -> Iterator[str]:
    if checkpoint.weights_note:
        yield f"{checkpoint.weights_note}: the weights' error here is not that of the original"
    if options.sensitivity and not checkpoint.has_loss:
        yield f"no sensitivity: {type(checkpoint.model).__name__} predicts no next token"
    silent = [row for row in rows if row["operand"] == "input" and not row["count"]]
    experts = sum(row["expert"] is not None for row in silent)
    if experts:
        yield f"{experts} linears of experts were reached by no token: profile more tokens"
    if len(silent) > experts:
        yield f"{len(silent) - experts} linears outside experts did not run on text alone"


# --- rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Summaries:
    """Statistics on the host: by weight and by input, and the rows' extra columns of weights."""

    weights: dict[str, Summary]
    inputs: dict[str, Summary]
    correlations: dict[str, float]


def _summaries(
    items: Sequence[LinearModule], inputs: Inputs, formats: Sequence[Format]
) -> _Summaries:
    """Measure the weights, and bring everything to the host in one transfer."""
    partners = gate_up_partners([item.linear for item in items])
    by_name = {item.linear.module: item for item in items}
    # A tied head is the embedding's tensor, and linears that share an input share its statistics:
    # each is reduced once.
    weights: dict[str, tuple[int, ...]] = {}
    reduced: dict[tuple[int, ...], Summary] = {}
    correlations: dict[str, Tensor] = {}
    for item in track(items, "profiling weights"):
        name, weight = item.linear.module, item.weight().detach()
        weights[name] = key = (weight.data_ptr(), *weight.shape)
        if key not in reduced:
            stats = TensorStats(
                weight.shape[1], operand="weight", formats=formats, device=weight.device
            )
            stats.update(weight)
            reduced[key] = stats.summary()
        if (partner := partners.get(name)) is not None:
            other = None if partner == name else by_name[partner].weight().detach()
            correlations[name] = gate_up_correlation(weight, other)
    shared = {id(stats): stats for stats in inputs.stats.values()}
    found = to_host([*reduced.values(), *(stats.summary() for stats in shared.values())])
    on_host = dict(zip([*reduced, *((key,) for key in shared)], found, strict=True))
    values = torch.stack(list(correlations.values())).tolist() if correlations else []
    return _Summaries(
        weights={name: on_host[key] for name, key in weights.items()},
        inputs={name: on_host[(id(stats),)] for name, stats in inputs.stats.items()},
        correlations=dict(zip(correlations, values, strict=True)),
    )


def _rows(items: Sequence[LinearModule], summaries: _Summaries) -> Iterator[dict[str, Any]]:
    """Yield the rows of profile.parquet; an input that nothing reached has counts of zero."""
    for item in items:
        linear = item.linear
        yield (
            summaries.weights[linear.module].row()
            | site_columns(linear, "weight")
            | {"step": 0, "gate_up_correlation": summaries.correlations.get(linear.module)}
        )
        if item.has_input:
            seen = summaries.inputs.get(linear.module)
            row = _EMPTY if seen is None else seen.row()
            yield row | site_columns(linear, "input") | {"step": 0}


def _error_rows(items: Sequence[LinearModule], summaries: _Summaries) -> Iterator[dict[str, Any]]:
    for item in items:
        for operand, found in (("weight", summaries.weights), ("input", summaries.inputs)):
            if (summary := found.get(item.linear.module)) is not None:
                site = {"site": f"{item.linear.module}:{operand}", "step": 0}
                yield from (site | row for row in summary.error_rows())


def _with_texts(row: dict[str, Any], ids: Tensor, tokenizer: Any) -> dict[str, Any]:
    """Return a row whose top tokens carry their text."""
    if row["operand"] == "weight":
        return row | {"top_tokens": None}
    tokens = [
        token | {"text": tokenizer.decode([int(ids[token["sequence"], token["position"]])])}
        if token["position"] >= 0
        else token
        for token in row.get("top_tokens", ())
    ]
    return row | {"top_tokens": tokens}


# --- files -------------------------------------------------------------------------------------


def _write(
    target: RunDir,
    asked: Mapping[str, Any],
    frames: Mapping[str, pl.DataFrame],
    facts: Mapping[str, Any],
    notes: Sequence[str],
) -> ProfileResult:
    """Write the tables and the manifest together, and drop what an earlier profile left."""
    target.commit(STAGE, asked, frames, **facts, notes=list(notes))
    remove_partial(target.path)
    if SENSITIVITY.file not in frames:
        (target.path / SENSITIVITY.file).unlink(missing_ok=True)
    return _result(target, up_to_date=False)


def _result(target: RunDir, *, up_to_date: bool) -> ProfileResult:
    entry = target.manifest["stages"][STAGE]
    tables = {name: target.read_table(name) for name in entry["files"]}
    return ProfileResult(
        run=target.path,
        up_to_date=up_to_date,
        profile=tables[PROFILE.file],
        errors=tables[ERRORS.file],
        sensitivity=tables.get(SENSITIVITY.file),
        formats=tuple(entry["options"]["formats"]),
        files=tuple(entry["files"]),
        notes=tuple(target.manifest.get("notes", ())),
    )
