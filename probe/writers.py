"""Recorded statistics as scalars in a dashboard, through its own client.

    writer = TensorBoardWriter("runs/first")            # pip install bitplan[tensorboard]
    writer = WandbWriter(wandb.init(project="mine"))    # pip install bitplan[wandb]
    writer.write(recorder.frame(), recorder.errors_frame())

Scalars are named `site/statistic`, and `site/statistic/format` where a format has a part in it. A
writer remembers the last step that it wrote and takes up from there, so that whole frames can be
given to it again and again; the callbacks do so after every recorded step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

STATISTICS = (
    "kurtosis",
    "absmax",
    "std",
    "max_over_median",
    "max_over_rms",
    "outlier_share",
    "channel_rms_kurtosis",
    "kurtosis_without_top_tokens",
    "nan_count",
    "inf_count",
    "drift",
    "gate_up_correlation",
    "gate_up_correlation_max",
)


class Writer(ABC):
    """Writes the rows of steps that it has not written yet.

    statistics: columns of tables.PROFILE. Nulls are left out.
    """

    def __init__(self, statistics: Sequence[str] = STATISTICS) -> None:
        self._statistics = tuple(statistics)
        self._latest = -1

    def write(self, stats: pl.DataFrame, errors: pl.DataFrame) -> None:
        """Write scalars of frames as the Recorder returns them."""
        rows = scalars(stats, errors, self._statistics).filter(pl.col("step") > self._latest)
        for (step,), found in rows.group_by("step", maintain_order=True):
            self._latest = int(step)
            self._write(self._latest, dict(found.select("name", "value").iter_rows()))

    @abstractmethod
    def _write(self, step: int, values: dict[str, float]) -> None: ...


class TensorBoardWriter(Writer):
    """Writes event files for TensorBoard into a directory."""

    def __init__(self, directory: str | Path, statistics: Sequence[str] = STATISTICS) -> None:
        super().__init__(statistics)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardWriter needs TensorBoard: pip install bitplan[tensorboard]"
            ) from error
        self._client: Any = SummaryWriter(str(directory))

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._client.add_scalar(name, value, step)
        self._client.flush()


class WandbWriter(Writer):
    """Logs to a run of Weights & Biases, what `wandb.init` returns.

    The scalars have an axis of their own, `bitplan/step`, so that they never disturb the steps of
    what else is logged.
    """

    def __init__(self, run: Any, statistics: Sequence[str] = STATISTICS) -> None:
        super().__init__(statistics)
        self._run = run
        self._known: set[str] = set()

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name in values.keys() - self._known:
            self._run.define_metric(name, step_metric="bitplan/step")
        self._known |= values.keys()
        self._run.log({"bitplan/step": step, **values})


def scalars(
    stats: pl.DataFrame, errors: pl.DataFrame, statistics: Sequence[str] = STATISTICS
) -> pl.DataFrame:
    """Return `step`, `name` and `value` of all that is not null, by step."""
    found = stats.select("site", "step", pl.col(*statistics).cast(pl.Float64)).unpivot(
        index=["site", "step"], variable_name="statistic"
    )
    of_formats = errors.select(
        "site", "step", pl.format("sqnr_db/{}", "format").alias("statistic"), value="sqnr_db"
    )
    return (
        pl.concat([found, of_formats])
        .drop_nulls("value")
        .sort("step", maintain_order=True)
        .select("step", pl.format("{}/{}", "site", "statistic").alias("name"), "value")
    )
