import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import nn

from bitplan.probe import Recorder, TensorBoardWriter, WandbWriter
from bitplan.probe.writers import STATISTICS, Writer, scalars


class Kept(Writer):
    """Keeps what it is asked to write."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.steps.append(step)
        self.values.append(values)


def recorded(steps: int = 2) -> tuple[pl.DataFrame, pl.DataFrame]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32)).train()
    with Recorder(model, formats=("int4-g32",)) as found:
        for _ in range(steps):
            model(torch.randn(3, 4, 32))
            found.step()
    return found.frame(), found.errors_frame()


def test_scalars_are_the_rows() -> None:
    stats, errors = recorded()
    found = {(step, name): value for step, name, value in scalars(stats, errors).iter_rows()}
    for row in stats.iter_rows(named=True):
        for name in STATISTICS:
            assert found.pop((row["step"], f"{row['site']}/{name}"), None) == row[name]
    for row in errors.iter_rows(named=True):
        assert found.pop((row["step"], f"{row['site']}/sqnr_db/int4-g32")) == row["sqnr_db"]
    assert not found


def test_whole_frames_can_be_given_again() -> None:
    stats, errors = recorded(3)
    writer = Kept()
    writer.write(stats.filter(pl.col("step") < 3), errors.filter(pl.col("step") < 3))
    writer.write(stats, errors)
    writer.write(stats, errors)
    assert writer.steps == [1, 2, 3]
    assert (
        writer.values[2]["0:input/kurtosis"]
        == stats.filter(site="0:input", step=3)["kurtosis"].item()
    )


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs bitplan[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stats, errors = recorded()
    TensorBoardWriter(tmp_path).write(stats, errors)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for site in ("0:input", "1:weight"):
        want = stats.filter(site=site).sort("step")
        read = events.Scalars(f"{site}/kurtosis")
        assert [event.step for event in read] == [1, 2]
        assert [event.value for event in read] == pytest.approx(want["kurtosis"].to_list())


def test_wandb_is_given_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs bitplan[wandb]")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stats, errors = recorded()
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    WandbWriter(run).write(stats, errors)
    summary: dict[str, Any] = {key: run.summary[key] for key in ("bitplan/step", "0:input/std")}
    run.finish()
    assert summary["bitplan/step"] == 2
    assert summary["0:input/std"] == stats.filter(site="0:input", step=2)["std"].item()
    assert list(tmp_path.rglob("*.wandb"))


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"bitplan\[tensorboard\]"):
        TensorBoardWriter("nowhere")
