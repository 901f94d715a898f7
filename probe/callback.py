"""The recorder as a callback of transformers.Trainer, in one line.

    trainer.add_callback(RecorderCallback(every=50, formats=("int4-g128",), output="stats"))

Writes stats.parquet (tables.PROFILE) and errors.parquet (tables.ERRORS) into `output` whenever the
Trainer saves a checkpoint and when it is done, each whole or not at all. A training that resumes
keeps the rows up to the step it resumes from; one that starts anew starts new files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from bitplan.formats import Format, Operand
from bitplan.probe.recording import Recording
from bitplan.probe.writers import Writer
from bitplan.sites import OPERANDS


class RecorderCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Records statistics of the trained model at every `every`-th optimizer step.

    output: the directory to write to; by default `bitplan` in the Trainer's output directory.
    writers: given the scalars of every recorded step (writers.py), which makes the host wait there.
    The other arguments are those of Recorder. Raises RunError where the files cannot be written, or
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
        writers: Sequence[Writer] = (),
    ) -> None:
        options = {"every": every, "formats": formats, "sites": sites, "drift": drift}
        self._recording = Recording(options, writers)
        self._output = Path(output) if output is not None else None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Attach the hooks, and read back what was recorded up to the step that resumes."""
        self._output = self._output or Path(args.output_dir) / "bitplan"
        self._recording.open(model, self._output, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of an optimizer step."""
        self._recording.step(is_main=state.is_world_process_zero)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the files, as of the checkpoint that was just saved."""
        if state.is_world_process_zero:
            self._recording.write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the files and remove the hooks."""
        if state.is_world_process_zero:
            self._recording.write()
        self._recording.close()
