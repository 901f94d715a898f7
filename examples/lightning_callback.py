"""Record statistics under Lightning: python examples/lightning_callback.py [OUTPUT]

The same small Llama as in record_training.py, in a LightningModule; the one line that bitplan needs
is the callback. Needs bitplan[lightning]. Writes OUTPUT/stats.parquet and OUTPUT/errors.parquet
(default: ./recorded).
"""

import inspect
import sys
import tempfile
import textwrap
from pathlib import Path

import lightning
import polars as pl
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.probe import LightningRecorderCallback

LENGTH = 64


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )

    def training_step(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(output: Path) -> None:
    torch.manual_seed(0)
    text = torch.tensor(list(inspect.getsource(textwrap).encode()))
    examples = [ids for ids in text.split(LENGTH) if len(ids) == LENGTH]
    callback = LightningRecorderCallback(every=5, formats=("int4-g32",), output=output)
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = lightning.Trainer(
            default_root_dir=checkpoints,
            callbacks=[callback],
            max_steps=20,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(examples, batch_size=4))

    stats = pl.read_parquet(output / "stats.parquet")
    inputs = stats.filter(pl.col("operand") == "input")
    with pl.Config(tbl_rows=-1):
        print(inputs.pivot("step", index="module", values="kurtosis"))
    print(f"wrote {output / 'stats.parquet'} and {output / 'errors.parquet'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "recorded"))
