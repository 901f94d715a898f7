"""The average of the weights over the last steps of a training, on which it is then judged.

The last weights of a training carry the noise of its last batches; their mean over a tail of the
steps carries less of it, and costs one more copy of the weights. What is averaged are the weights
that the optimizer moves; where they are fake-quantized, it is their average that is.
"""

from typing import Any

import torch
from torch import nn


class TailAverage:
    """The running mean of a model's trainable parameters over its last steps, in float32."""

    def __init__(self, model: nn.Module, *, steps: int, share: float) -> None:
        """Average the weights after the last `share` of `steps` steps; none of them for 0."""
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.first = steps - round(share * steps)
        self.count = 0
        self.mean: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after step `step`, from 0, where it belongs to the tail."""
        if step < self.first:
            return
        self.count += 1
        for name, parameter in self.parameters.items():
            value = parameter.detach().float()
            if self.count == 1:
                self.mean[name] = value.clone()
            else:
                self.mean[name].lerp_(value, 1 / self.count)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average in the model's place; without a tail, leave the model as it is."""
        for name, mean in self.mean.items():
            self.parameters[name].copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` goes on from."""
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; its tensors are moved to where the parameters are."""
        self.count = state["count"]
        self.mean = {n: mean.to(self.parameters[n].device) for n, mean in state["mean"].items()}
