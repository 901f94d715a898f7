from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bitplan.probe import Recorder
from bitplan.tables import PROFILE

NAMES = ("lightning.pytorch", "pytorch_lightning")
# Lightning's own hints about workers, loggers and cores.
pytestmark = pytest.mark.filterwarnings("ignore")


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, generator=generator) for _ in range(6)]


def loader() -> DataLoader[Tensor]:
    return DataLoader(data(), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def make_module(package: Any) -> Any:
    class Module(package.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fails_at = -1
            self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            if index == self.fails_at:
                raise ZeroDivisionError
            out: Tensor = self.model(batch)
            return out.square().mean()

        def validation_step(self, batch: Tensor, index: int) -> None:
            self.model(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def make_trainer(package: Any, directory: Path, callback: Any, **options: Any) -> Any:
    return package.Trainer(
        default_root_dir=directory,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_line_records_a_training(name: str, tmp_path: Path) -> None:
    package = pytest.importorskip(name, reason="needs bitplan[lightning]")
    callback = import_module("bitplan.probe.lightning").LightningRecorderCallback(
        every=2, formats=("int4-g32",)
    )
    module = make_module(package)
    trainer = make_trainer(package, tmp_path, callback, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, loader(), loader())
    stats = pl.read_parquet(tmp_path / "bitplan" / "stats.parquet")
    assert dict(stats.schema) == PROFILE.schema
    # 3 optimizer steps an epoch, of two batches of 2 x 3 tokens; the validation is not counted.
    assert stats["step"].unique().sort().to_list() == [2, 4, 6]
    assert set(stats.filter(operand="input")["tokens"]) == {12}
    assert (tmp_path / "bitplan" / "errors.parquet").is_file()
    assert sum(len(m._forward_pre_hooks) for m in module.modules()) == 0

    plain = make_module(package)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with Recorder(plain.train(), every=2, formats=("int4-g32",)) as want:
        for step in range(6):
            for batch in data()[2 * (step % 3) : 2 * (step % 3) + 2]:
                (plain.training_step(batch, 0) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            want.step()
    assert stats.equals(want.frame())


def test_an_error_leaves_no_hooks_and_keeps_the_rows(tmp_path: Path) -> None:
    package = pytest.importorskip(NAMES[0], reason="needs bitplan[lightning]")
    callback = import_module("bitplan.probe.lightning").LightningRecorderCallback(
        every=1, output=tmp_path / "out"
    )
    module = make_module(package)
    module.fails_at = 2
    with pytest.raises(ZeroDivisionError):
        make_trainer(package, tmp_path, callback, max_epochs=1).fit(module, loader())
    assert pl.read_parquet(tmp_path / "out" / "stats.parquet")["step"].unique().to_list() == [1, 2]
    assert sum(len(m._forward_pre_hooks) for m in module.modules()) == 0
