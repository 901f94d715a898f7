"""The embedded checkpoint with planted outliers, as one more model for alternatives.py.

    python benchmarks/planted.py DIR
    python benchmarks/alternatives.py profile ask --model DIR ...

Rows of up_proj times 64, the matching columns of down_proj over 64: the logits stay the same to the
last bit, while a channel of the input of down_proj becomes an outlier (tests/test_planted.py).
"""

import sys
from pathlib import Path
from typing import Any

import torch

from bitplan.probe.checkpoint import load_checkpoint

EMBEDDED = Path(__file__).parents[1] / "core" / "embedded"
CHANNELS = {0: 17, 2: 300}
FACTOR = 64


def plant(folder: Path) -> float:
    """Save the checkpoint with its outliers; return the largest change of a logit."""
    loaded = load_checkpoint(str(EMBEDDED), device="cpu")
    model: Any = loaded.model
    ids = torch.arange(512)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for block, channel in CHANNELS.items():
            mlp = model.model.layers[block].mlp
            mlp.up_proj.weight[channel] *= FACTOR
            mlp.down_proj.weight[:, channel] /= FACTOR
        change = (model(input_ids=ids).logits - before).abs().max()
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return float(change)


if __name__ == "__main__":
    print(f"largest change of a logit: {plant(Path(sys.argv[1])):g}")
