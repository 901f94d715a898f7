"""The recorder as a callback of transformers.Trainer, in one line.

    trainer.add_callback(RecorderCallback(every=50, formats=("int4-g128",), output="stats"))

Writes stats.parquet (tables.PROFILE) and errors.parquet (tables.ERRORS) into `output` whenever the
Trainer saves a checkpoint and when it is done, each whole or not at all. A training that resumes
keeps the rows up to the step it resumes from; one that starts anew starts new files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from torch import nn
from transformers import TrainerCallback

from bitplan.errors import RunError
from bitplan.formats import Format, Operand
from bitplan.probe.recorder import Recorder
from bitplan.rundir import SCHEMA_VERSION, versions, write_atomic
from bitplan.sites import OPERANDS

STATS_FILE = "stats.parquet"
ERRORS_FILE = "errors.parquet"


class RecorderCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Records statistics of the trained model at every `every`-th optimizer step.

    output: the directory to write to; by default `bitplan` in the Trainer's output directory. The
    other arguments are those of Recorder. Raises RunError where the files cannot be written, or
    those of the training that resumes cannot be read.
    """

    def __init__(
        self,
        every: int = 50,
        formats: Sequence[Format | str] = (),
        output: str | Path | None = None,
        *,
        sites: Sequence[Operand] = OPERANDS,
        drift: bool = False,
    ) -> None:
        self._every = every
        self._formats = formats
        self._output = Path(output) if output is not None else None
        self._sites = sites
        self._drift = drift
        self._recorder: Recorder | None = None
        self._earlier: dict[str, pl.DataFrame] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Attach the hooks, and read back what was recorded up to the step that resumes."""
        self._close()
        self._output = self._output or Path(args.output_dir) / "bitplan"
        self._earlier = _read_until(self._output, state.global_step)
        self._recorder = Recorder(
            model,
            self._every,
            self._formats,
            self._sites,
            drift=self._drift,
            start=state.global_step,
        ).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of an optimizer step."""
        if self._recorder is not None:
            self._recorder.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the files, as of the checkpoint that was just saved."""
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the files and remove the hooks."""
        self._write(state)
        self._close()

    def _write(self, state: Any) -> None:
        recorder = self._recorder
        if recorder is None or recorder.steps == recorder.start or not state.is_world_process_zero:
            return
        frames = {STATS_FILE: recorder.frame(), ERRORS_FILE: recorder.errors_frame()}
        assert self._output is not None
        note = {"bitplan": json.dumps({"schema": SCHEMA_VERSION, "versions": versions()})}
        for name, frame in frames.items():
            if (earlier := self._earlier.get(name)) is not None:
                frame = pl.concat([earlier, frame])
            _write_parquet(self._output / name, frame, note)

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None


def _write_parquet(path: Path, frame: pl.DataFrame, note: dict[str, str]) -> None:
    write_atomic(path, lambda file: frame.write_parquet(file, compression="zstd", metadata=note))


def _read_until(directory: Path, step: int) -> dict[str, pl.DataFrame]:
    """Return the rows of the files in a directory up to a step; none for step 0 or no files."""
    paths = [directory / name for name in (STATS_FILE, ERRORS_FILE)]
    if step == 0:
        return {}
    try:
        return {
            path.name: pl.read_parquet(path).filter(pl.col("step") <= step)
            for path in paths
            if path.is_file()
        }
    except (pl.exceptions.PolarsError, OSError) as error:
        raise RunError(
            f"{directory} holds statistics of the training that resumes, but they cannot be read "
            f"({error}): move them away to go on without them"
        ) from error
