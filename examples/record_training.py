"""Record statistics in your own training loop: python examples/record_training.py [OUTPUT]

A small Llama learns the bytes of Python's own source files for a few steps. Every fifth step the
Recorder notes how heavy-tailed each linear's input and weight are, and what 4 bits would cost.
Writes OUTPUT/stats.parquet and OUTPUT/errors.parquet (default: ./recorded).
"""

import inspect
import sys
import textwrap
from pathlib import Path

import polars as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.probe import Recorder

STEPS, BATCH, LENGTH = 20, 4, 64


def main(output: Path) -> None:
    torch.manual_seed(0)
    text = torch.tensor(list(inspect.getsource(textwrap).encode()))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with Recorder(model, every=5, formats=("int4-g32", "int8-token"), drift=True) as recorder:
        for step in range(1, STEPS + 1):
            starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
            ids = text[starts + torch.arange(LENGTH)]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
            if step % 5 == 0:
                print(f"step {step}: loss {loss.item():.3f}")

    output.mkdir(parents=True, exist_ok=True)
    stats, errors = recorder.frame(), recorder.errors_frame()
    stats.write_parquet(output / "stats.parquet")
    errors.write_parquet(output / "errors.parquet")

    last = pl.col("step") == STEPS
    table = (
        stats.filter(last)
        .join(errors.filter(last, pl.col("format") == "int4-g32"), on="site")
        .group_by("operand", "role", maintain_order=True)
        .agg(
            pl.col("kurtosis", "max_over_median").median().round(2),
            pl.col("sqnr_db").median().round(1).alias("int4-g32 SQNR, dB"),
        )
    )
    with pl.Config(tbl_rows=-1):
        print(table)
    print(f"wrote {output / 'stats.parquet'} and {output / 'errors.parquet'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "recorded"))
