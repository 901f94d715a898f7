"""The exception tree: every error a user can cause, and nothing else.

    BitplanError (a ValueError)      exit code 2: one clear line, no traceback
    |-- CheckpointError              missing, truncated, unsupported or non-finite model
    |-- DataError                    empty or non-text data, too few tokens
    |-- FormatError                  a number format that does not parse or does not apply
    |-- RunError                     a run directory of another version, in use, or incomplete
    |-- PlanError                    a plan that does not fit the checkpoint, or a wrong pin
    |   `-- BudgetError              no plan meets the budget; carries the smallest that one does
    |-- TrainingError                a training that cannot go on: out of memory, a wrong launch
    |   `-- DivergedError            its loss or gradient is not finite; other trainings can go on
    |-- FirstProcessError            what the first process of a launch met, and says itself
    `-- FitError                     trainings that cannot carry a fit of the law

Messages say what was asked, what was found, and what to do, on one line.
"""


class BitplanError(ValueError):
    """Base of all errors that are the input's fault and not ours."""


class CheckpointError(BitplanError):
    """The model is missing, damaged, unsupported or holds non-finite weights."""


class DataError(BitplanError):
    """The text is missing, empty, not text, or too short for what was asked."""


class FormatError(BitplanError):
    """A number format does not parse, or does not apply to the operand."""


class RunError(BitplanError):
    """A run directory is missing, incomplete, in use or of another schema version."""


class PlanError(BitplanError):
    """A plan, a pin or a rule does not fit the checkpoint."""


class BudgetError(PlanError):
    """No plan meets the budget; `smallest` is the smallest value of it that can be met."""

    def __init__(self, message: str, *, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


class TrainingError(BitplanError):
    """A training cannot go on (non-finite loss, too little memory)."""


class DivergedError(TrainingError):
    """A training's loss or gradient is not finite; every process of the training raises it."""


class FirstProcessError(BitplanError):
    """The first process of a launch ended in an error, which it says itself."""


class FitError(BitplanError):
    """The trainings cannot carry a fit of the law, or a file holds none."""
