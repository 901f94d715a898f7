"""`bitplan profile`: a checkpoint to tables of statistics, errors, outliers and sensitivity.

The stage loads a checkpoint, reads calibration text, measures every weight and every input, and
writes the tables together at its end: what fails leaves the run directory as it was. Asked again
with the same options, checkpoint and text, it returns what is there. Interventions, which take far
longer, come after that and are added to the finished profile, those of a pass together.

A model whose weights in float32 do not fit in memory is run block by block (streamed.py): the same
tables, and where that is interrupted, the parts that were finished wait in the run directory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor

from bitplan.errors import BitplanError, CheckpointError, DataError
from bitplan.formats import Format, parse_formats
from bitplan.options import ProfileOptions
from bitplan.probe.blocks import PartedModel
from bitplan.probe.channels import channel_overlap
from bitplan.probe.checkpoint import (
    Checkpoint,
    check_vocabulary,
    float32_bytes,
    hash_files,
    identify,
    load_checkpoint,
    open_in_parts,
    resolve_device,
    some,
)
from bitplan.probe.inputs import measure_inputs
from bitplan.probe.interventions import measure_interventions
from bitplan.probe.measured import Count, to_measure, with_effects
from bitplan.probe.memory import available_bytes
from bitplan.probe.modules import find_linears
from bitplan.probe.outliers import unread_note
from bitplan.probe.partial import opened_partial, remove_partial
from bitplan.probe.result import ProfileResult
from bitplan.probe.streamed import profile_blocks
from bitplan.probe.tabulate import tabulate, text_of, with_texts
from bitplan.probe.text import Corpus, load_text, tokenize
from bitplan.probe.weights import (
    open_weights,
    profile_weights,
)
from bitplan.progress import track
from bitplan.rundir import RunDir, content_hash, versions
from bitplan.tables import ERRORS, OUTLIERS, PROFILE, SENSITIVITY

STAGE = "profile"
_NONE = {"interventions": 0}


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
        asked = _asked(target, options) | {
            "model_hash": identify(options.model, trust_remote_code=options.trust_remote_code),
            "data_hash": corpus.content_hash,
        }
        is_done = target.is_done(STAGE, asked)
        if is_done and _is_measured(target, options.interventions):
            remove_partial(run)
            return _result(target, up_to_date=True)
        opened = _open(options, asked["model_hash"])
        checkpoint = opened.checkpoint
        if options.interventions and not checkpoint.has_loss:
            raise CheckpointError(
                f"{type(checkpoint.model).__name__} predicts no next token, so that interventions "
                "have nothing to change: leave out --interventions"
            )
        ids = _calibration_ids(checkpoint, corpus, options)
        if not is_done:
            _measure(target, options, asked | _NONE, formats, corpus, opened, ids)
        if options.interventions:
            now = {"interventions": options.interventions}
            _intervene(target, options, asked | now, checkpoint, ids)
        return _result(target, up_to_date=False)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint, in memory or else in parts, and what the user should know of that."""

    checkpoint: Checkpoint
    parted: PartedModel | None = None
    notes: tuple[str, ...] = ()


def _open(options: ProfileOptions, model_hash: str) -> _Opened:
    """Load the checkpoint, or open it in parts where it does not fit or that was asked for."""
    trusted = options.trust_remote_code
    if (reason := _why_stream(options)) is None:
        loaded = load_checkpoint(options.model, device=options.device, trust_remote_code=trusted)
        return _Opened(loaded)
    if options.interventions:
        raise BitplanError(
            f"interventions run the whole model, but {reason}: leave out --interventions, or pass "
            "--no-stream where the model fits in memory"
        )
    checkpoint, parted = open_in_parts(
        options.model,
        device=options.device,
        trust_remote_code=trusted,
        content_hash=model_hash,
    )
    return _Opened(checkpoint, parted, (reason,))


def _asked(target: RunDir, options: ProfileOptions) -> dict[str, Any]:
    """Return the options that identify a profile, with the interventions that it already holds.

    Interventions only add rows, so that other ones make no other profile.
    """
    if options.interventions and (options.weights_only or not options.sensitivity):
        raise BitplanError(
            "interventions are chosen by the estimates of the backward passes: leave out "
            f"{'--weights-only' if options.weights_only else '--no-sensitivity'}"
        )
    done = target.manifest["stages"].get(STAGE, {}).get("options", {})
    asked = asdict(options) | {"interventions": done.get("interventions", 0)}
    del asked["stream"]  # the tables are the same
    return asked


def _tables(target: RunDir) -> dict[str, pl.DataFrame]:
    """Return the tables of the finished profile by file name."""
    return {name: target.read_table(name) for name in target.manifest["stages"][STAGE]["files"]}


def _is_measured(target: RunDir, count: Count) -> bool:
    """Whether the finished profile holds these interventions."""
    if not count:
        return True
    tables = _tables(target)
    return SENSITIVITY.file in tables and not to_measure(
        tables[PROFILE.file], tables[SENSITIVITY.file], count
    )


def _intervene(
    target: RunDir,
    options: ProfileOptions,
    asked: Mapping[str, Any],
    checkpoint: Checkpoint,
    ids: Tensor,
) -> None:
    """Measure what is left, adding rows to the finished profile as they come."""
    tables = _tables(target)
    left = to_measure(tables[PROFILE.file], tables[SENSITIVITY.file], options.interventions)
    items = find_linears(checkpoint.model)
    for effects in measure_interventions(checkpoint.model, items, ids, left):
        tables[SENSITIVITY.file] = with_effects(tables[SENSITIVITY.file], effects)
        target.commit(STAGE, asked, tables)


def _measure(
    target: RunDir,
    options: ProfileOptions,
    asked: Mapping[str, Any],
    formats: Sequence[Format],
    corpus: Corpus,
    opened: "_Opened",
    ids: Tensor,
) -> None:
    checkpoint, parted = opened.checkpoint, opened.parted
    items = find_linears(checkpoint.model)
    wanted = {"has_loss": checkpoint.has_loss, "sensitivity": options.sensitivity}
    tables_of = partial(tabulate, formats=formats)
    if parted is None:
        inputs = measure_inputs(checkpoint.model, items, ids, formats, **wanted)
        tables = tables_of(items, inputs)
        sensitivity = inputs.sensitivity
        notes = [*inputs.notes, *unread_note(inputs.outliers.unread)]
    else:
        question = dict(asked) | {"versions": versions(), "device": str(parted.device)}
        with opened_partial(target.path, content_hash(question)) as kept:
            streamed = profile_blocks(parted, items, ids, formats, tables_of, kept, **wanted)
        tables, sensitivity, notes = streamed.tables, streamed.sensitivity, list(streamed.notes)
    text = partial(text_of, ids, checkpoint.tokenizer)
    rows = [with_texts(row, text) for row in tables.rows]
    overlap = channel_overlap(rows)
    frames = {
        PROFILE.file: PROFILE.frame(
            row | {"top_channel_overlap": overlap.get(row["site"])} for row in rows
        ),
        ERRORS.file: ERRORS.frame(tables.errors),
        OUTLIERS.file: OUTLIERS.frame(row | {"text": text(row)} for row in tables.outliers),
    }
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
    all_notes = [*opened.notes, *_notes(checkpoint, rows, options), *corpus.notes, *notes]
    _write(target, asked, frames, facts, all_notes)


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
    asked = _asked(target, options) | _NONE | {"model_hash": hash_files(files.files)}
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
    _write(target, asked, frames, {"model": model, "data": None, "seed": None}, notes)
    return _result(target, up_to_date=False)


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
    check_vocabulary(model, ids, options.model)
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


# --- files -------------------------------------------------------------------------------------


def _write(
    target: RunDir,
    asked: Mapping[str, Any],
    frames: Mapping[str, pl.DataFrame],
    facts: Mapping[str, Any],
    notes: Sequence[str],
) -> None:
    """Write the tables and the manifest together, and drop what an earlier profile left."""
    target.commit(STAGE, asked, frames, **facts, notes=list(notes))
    remove_partial(target.path)
    for table in (SENSITIVITY, OUTLIERS):
        if table.file not in frames:
            (target.path / table.file).unlink(missing_ok=True)


def _result(target: RunDir, *, up_to_date: bool) -> ProfileResult:
    entry = target.manifest["stages"][STAGE]
    tables = _tables(target)
    return ProfileResult(
        run=target.path,
        up_to_date=up_to_date,
        profile=tables[PROFILE.file],
        errors=tables[ERRORS.file],
        sensitivity=tables.get(SENSITIVITY.file),
        outliers=tables.get(OUTLIERS.file),
        formats=tuple(map(str, parse_formats(entry["options"]["formats"]))),
        files=tuple(entry["files"]),
        notes=tuple(target.manifest.get("notes", ())),
    )
