"""The recorder as a callback of Lightning's Trainer (`pip install bitplan[lightning]`).

    Trainer(callbacks=[LightningRecorderCallback(every=50, formats=("int4-g128",), output="stats")])

The files are those of callback.py; they are written whenever a checkpoint is saved, and when the
training ends, by an error too. Trainers of `lightning` and of `pytorch_lightning` both take it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitplan.formats import Format, Operand
from bitplan.probe.recording import Recording
from bitplan.probe.writers import Writer
from bitplan.sites import OPERANDS

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "LightningRecorderCallback needs Lightning: pip install bitplan[lightning]"
        ) from error


class LightningRecorderCallback(Callback):  # type: ignore[misc]  # untyped where not installed
    """Records statistics of the LightningModule at every `every`-th optimizer step.

    output: the directory to write to; by default `bitplan` in the Trainer's root directory. The
    other arguments and the errors are those of RecorderCallback. With several optimizers each
    counts its own steps, as `trainer.global_step` does.
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
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the hooks, and read back what was recorded up to the step that resumes."""
        self._output = self._output or Path(trainer.default_root_dir) / "bitplan"
        self._steps = trainer.global_step
        self._recording.open(pl_module, self._output, self._steps)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Mark the end of the optimizer steps that were taken."""
        while self._steps < trainer.global_step:
            self._steps += 1
            self._recording.step(is_main=trainer.is_global_zero)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: object) -> None:
        """Write the files, as of the checkpoint that is being saved."""
        if trainer.is_global_zero:
            self._recording.write()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the files and remove the hooks."""
        if trainer.is_global_zero:
            self._recording.write()
        self._recording.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the files and remove the hooks."""
        self.on_train_end(trainer, pl_module)
