"""Statistics in TensorBoard and in Weights & Biases: python examples/dashboards.py [OUTPUT]

A small network is recorded every fifth step; whichever client is installed (bitplan[tensorboard],
bitplan[wandb]) gets the scalars as they come, in OUTPUT (default: ./dashboards). Weights & Biases
runs offline here: `wandb sync` sends what it wrote. Look at the rest with
`tensorboard --logdir OUTPUT`.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from bitplan.probe import Recorder, TensorBoardWriter, WandbWriter
from bitplan.probe.writers import Writer


def main(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    writers: list[Writer] = []
    try:
        writers.append(TensorBoardWriter(output))
    except ImportError as error:
        print(error)
    try:
        import wandb

        writers.append(WandbWriter(wandb.init(project="bitplan", mode="offline", dir=output)))
    except ImportError:
        print("WandbWriter needs wandb: pip install bitplan[wandb]")

    with Recorder(model, every=5, formats=("int4-g32",), drift=True) as recorder:
        for step in range(1, 21):
            x = torch.randn(32, 16, 64)
            (model(x) - x.roll(1, -1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
            if step % 5 == 0:
                for writer in writers:
                    writer.write(recorder.frame(), recorder.errors_frame())
    for writer in writers:
        print(f"{type(writer).__name__} wrote steps 5 to 20 to {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dashboards"))
