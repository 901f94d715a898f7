"""How every arm is trained: the paper's recipe (arXiv 2505.14302, section 4) as pure functions.

AdamW (0.9, 0.95), weight decay 0.1 on matrices, gradients clipped to norm 1, a short warmup, then a
cosine to a tenth of the peak, or the peak held and a short decay at the end. The learning rate and
the length are the user's. Factors of trained scales (quantizers.py) start at 1 and follow the same
schedule from a peak of their own, undecayed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitplan.errors import TrainingError
from bitplan.qat.quantizers import FACTORS

Schedule = Literal["cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every arm is trained."""

    steps: int
    batch_size: int
    seq_len: int
    lr: float
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    final_lr_share: float = 0.1
    warmup_share: float = 0.1
    decay_share: float = 0.2
    """Of `wsd`: the last steps, in which the rate falls."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """Applied to parameters of two dimensions or more."""
    factor_lr: float = 1e-2
    """Peak learning rate of the factors of trained scales."""
    clip_norm: float = 1.0
    compiled: bool = False
    """Compile the blocks, where steps are captured (step.py)."""
    average_tail: float = 0.0
    """Share of the steps, the last ones, after which the weights are averaged for the held-out
    loss."""
    records: int = 2
    """How often statistics are recorded: half way and at the end."""

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.steps * self.step_tokens


def share_of_peak(step: int, recipe: Recipe) -> float:
    """Return the share of the peak rate at step `step`, from 0.

    A linear warmup, then down to the final share: along a cosine, or (`wsd`: warmup, stable, decay)
    at the peak first and linearly in the last steps.
    """
    warmup = max(1, round(recipe.warmup_share * recipe.steps))
    if step < warmup:
        return (step + 1) / warmup
    final = recipe.final_lr_share
    if recipe.schedule == "wsd":
        decay = max(1, round(recipe.decay_share * recipe.steps))
        progress = max(0.0, (step - (recipe.steps - decay)) / decay)
        return 1 - (1 - final) * progress
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def sequence_losses(model: nn.Module, ids: Tensor, *, compiled: bool = False) -> Tensor:
    """Return each sequence's mean next-token loss, [sequence], nats; ids: [sequence, seq_len].

    compiled: from the logits on; they are the largest tensor of small models, and read once.
    """
    logits = model(input_ids=ids).logits
    return (_compiled_losses() if compiled else _losses)(logits, ids)


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    # The last position has no next token. Ignoring it costs less than slicing it off.
    following = F.pad(ids[:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(logits.float().flatten(0, 1), following.flatten(), reduction="none")
    return losses.view(ids.shape).sum(1) / (ids.shape[1] - 1)


@cache
def _compiled_losses() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_losses, dynamic=False)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW over what is not frozen, with weight decay on the matrices alone.

    Each group keeps its peak learning rate as `peak_lr`, which the schedule multiplies. Raises
    TrainingError where every parameter is frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("nothing to train: every parameter is frozen (requires_grad is False)")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factors = [p for name, p in named if name.endswith(FACTORS)]
    weights = [p for name, p in named if not name.endswith(FACTORS)]
    groups = [
        (recipe.lr, recipe.weight_decay, [p for p in weights if p.dim() >= 2]),
        (recipe.lr, 0.0, [p for p in weights if p.dim() < 2]),
        (recipe.factor_lr, 0.0, factors),
    ]
    return torch.optim.AdamW(
        [{"params": ps, "lr": lr, "peak_lr": lr, "weight_decay": d} for lr, d, ps in groups if ps],
        betas=recipe.betas,
        fused=True,
    )
