"""Record statistics under transformers.Trainer: python examples/trainer_callback.py [OUTPUT]

The same small Llama as in record_training.py; the one line that bitplan needs is the callback.
Writes OUTPUT/stats.parquet and OUTPUT/errors.parquet (default: ./recorded).
"""

import inspect
import sys
import tempfile
import textwrap
from pathlib import Path

import polars as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bitplan.probe import RecorderCallback

LENGTH = 64


def main(output: Path) -> None:
    torch.manual_seed(0)
    text = torch.tensor(list(inspect.getsource(textwrap).encode()))
    examples = [
        {"input_ids": ids, "labels": ids} for ids in text.split(LENGTH) if len(ids) == LENGTH
    ]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments = TrainingArguments(
            checkpoints,
            max_steps=20,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=examples)
        trainer.add_callback(RecorderCallback(every=5, formats=("int4-g32",), output=output))
        trainer.train()

    stats = pl.read_parquet(output / "stats.parquet")
    inputs = stats.filter(pl.col("operand") == "input")
    with pl.Config(tbl_rows=-1):
        print(inputs.pivot("step", index="module", values="kurtosis"))
    print(f"wrote {output / 'stats.parquet'} and {output / 'errors.parquet'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "recorded"))
