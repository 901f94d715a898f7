"""What the callbacks of training libraries share: a Recorder, its files, and writers of scalars."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from torch import nn

from bitplan.errors import RunError
from bitplan.probe.recorder import Recorder
from bitplan.probe.writers import Writer
from bitplan.rundir import SCHEMA_VERSION, versions, write_atomic

STATS_FILE = "stats.parquet"
ERRORS_FILE = "errors.parquet"


class Recording:
    """Records a model from `open` to `close` and keeps the files of a directory.

    options: arguments of Recorder. writers: given the scalars of every recorded step as it ends.
    """

    def __init__(self, options: dict[str, Any], writers: Sequence[Writer] = ()) -> None:
        self._options = options
        self._writers = writers
        self._recorder: Recorder | None = None
        self._output = Path()
        self._earlier: dict[str, pl.DataFrame] = {}

    def open(self, model: nn.Module, output: Path, step: int) -> None:
        """Attach the hooks, and read back what was recorded up to the step that resumes."""
        self.close()
        self._output = output
        self._earlier = _read_until(output, step)
        self._recorder = Recorder(model, start=step, **self._options).__enter__()

    def step(self, *, is_main: bool) -> None:
        """Mark the end of an optimizer step."""
        recorder = self._recorder
        if recorder is None:
            return
        recorder.step()
        if is_main and self._writers and recorder.steps % recorder.every == 0:
            stats, errors = recorder.frame(), recorder.errors_frame()
            for writer in self._writers:
                writer.write(stats, errors)

    def write(self) -> None:
        """Write the files, each whole or not at all."""
        recorder = self._recorder
        if recorder is None or recorder.steps == recorder.start:
            return
        frames = {STATS_FILE: recorder.frame(), ERRORS_FILE: recorder.errors_frame()}
        note = {"bitplan": json.dumps({"schema": SCHEMA_VERSION, "versions": versions()})}
        for name, frame in frames.items():
            if (earlier := self._earlier.get(name)) is not None:
                frame = pl.concat([earlier, frame])
            _write_parquet(self._output / name, frame, note)

    def close(self) -> None:
        """Remove the hooks."""
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
