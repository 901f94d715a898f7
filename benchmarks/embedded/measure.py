"""Pearson kurtosis of the inputs of every linear layer, by role and block.

Plain forward hooks on the linear modules of a Hugging Face checkpoint, held-out text, nothing of
bitplan: the table in the model card should not depend on the code that the checkpoint is there to
demonstrate. Kurtosis is pooled over tokens and channels (a normal distribution has 3) and computed
in float64 from power sums, so that the whole held-out text passes in bounded memory. The linears
of one role share their input (q, k and v; gate and up), hence one of them is watched.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from corpus import Data, write_json
from torch import nn
from train import Windows
from transformers import AutoModelForCausalLM

logger = logging.getLogger("embedded.measure")

ROLES = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "fc1": "mlp.gate_proj"}
ROLES |= {"fc2": "mlp.down_proj"}
BATCH_SEQUENCES = 8


@dataclass
class Moments:
    """Running power sums of everything that was added."""

    count: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    largest: float = 0.0

    def add(self, values: torch.Tensor) -> None:
        wide = values.detach().to(torch.float64).flatten()
        square = wide.square()
        powers = [wide.sum(), square.sum(), (square * wide).sum(), square.square().sum()]
        self.sums += torch.stack(powers).cpu()
        self.count += wide.numel()
        self.largest = max(self.largest, float(wide.abs().max()))

    def kurtosis(self) -> float:
        mean, second, third, fourth = (self.sums / self.count).tolist()
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return float(central / variance**2)


def watch(moments: Moments) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        moments.add(inputs[0])

    return hook


@torch.no_grad()
def measure(checkpoint: Path, data: Data, sequence_tokens: int, device: str) -> dict[str, Any]:
    """The kurtosis table of a checkpoint over the whole held-out text."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device)
    table: dict[tuple[int, str], Moments] = {}
    for block, layer in enumerate(model.model.layers):
        for role, path in ROLES.items():
            table[block, role] = Moments()
            layer.get_submodule(path).register_forward_pre_hook(watch(table[block, role]))
    windows = Windows(data.tokens(data.held_out), sequence_tokens)
    for first in range(0, len(windows), BATCH_SEQUENCES):
        indices = list(range(first, min(first + BATCH_SEQUENCES, len(windows))))
        model(input_ids=windows.take(indices, model.device)[:, :-1], use_cache=False)
    return {
        "tokens": len(windows) * sequence_tokens,
        "sequence_tokens": sequence_tokens,
        "inputs": [
            {
                "block": block,
                "role": role,
                "kurtosis": moments.kurtosis(),
                "max_abs": moments.largest,
            }
            for (block, role), moments in table.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Kurtosis of linear inputs by role and block.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="directory made by corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--sequence", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    data = Data(arguments.data)
    result = measure(arguments.checkpoint, data, arguments.sequence, arguments.device)
    for row in result["inputs"]:
        logger.info("block %(block)d %(role)-3s kurtosis %(kurtosis)10.2f max %(max_abs).2f", row)
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
