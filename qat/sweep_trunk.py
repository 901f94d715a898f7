"""A trunk: one bf16 training at a constant rate, from whose points branched arms go on.

    SWEEP/trunks/NAME/                 a trunk: a model, a recipe, a seed of weights and data
        d2400256.safetensors           its weights after so many tokens: a point
        arms/trunk/seed-0/             its losses, and the state from which a longer one goes on

A trunk has a warmup and then the peak rate, and no end: its configuration says nothing of points,
so that the weights at one are the same whatever other points a grid has, and a grid may grow.
Points are tasks, each goes on from the one before, and arms wait for theirs.

An arm takes the weights of its point and nothing of the optimizer. Adam's moments of the recipe,
(0.9, 0.95), remember 10 and 20 steps; the warmup with which every arm begins anew is as long, so
little of the trunk's would outlive it, an arm's trained scales have no moments to take, and a point
is a third of the size. bf16 arms begin in the same way, so a delta holds nothing of it.

A trunk that is trained again elsewhere differs by rounding, which training makes as large as
another seed does. So arms compare where they began from the very same weights, whose hash each
notes (record.py).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from bitplan.errors import RunError
from bitplan.qat import record as files
from bitplan.qat.job import Job
from bitplan.qat.recipe import Recipe
from bitplan.qat.start import Start
from bitplan.qat.sweep_tokens import Read, Tokens
from bitplan.qat.train import train_arm
from bitplan.rundir import RunDir, file_hash, write_atomic

TRUNKS = "trunks"
ARM = "trunk"
ENDLESS = 1 << 40
"""Steps of a trunk: more than any has; a power of two, for exact shares."""


def trunk_recipe(arm: Recipe, warmup_steps: int) -> Recipe:
    """Return the recipe of a trunk: what an arm's says of a step, at a constant rate."""
    return Recipe(
        steps=ENDLESS,
        batch_size=arm.batch_size,
        seq_len=arm.seq_len,
        lr=arm.lr,
        schedule="wsd",
        final_lr_share=1.0,
        warmup_share=warmup_steps / ENDLESS,
        betas=arm.betas,
        weight_decay=arm.weight_decay,
        clip_norm=arm.clip_norm,
        compiled=arm.compiled,
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trunk after some of its steps, as any process can train it."""

    run: Path
    """The trunk's directory."""
    start: Start
    seed: int
    recipe: Recipe
    steps: int
    since: int = 0
    """Steps that are there already when it is its turn, for a forecast."""
    tokens: Tokens
    params: int
    context: Mapping[str, Any]

    def job(self, *, with_text: bool = True) -> Job:
        """Return the trunk's training, with the text up to this point."""
        none = torch.empty(0, self.recipe.seq_len, dtype=torch.int64)
        return Job(
            arm=ARM,
            seed=self.seed,
            formats={},
            quantizers={},
            recipe=self.recipe,
            train=self.tokens.train_ids(self.read.sequences, self.seed) if with_text else none,
            heldout=none,
            context=self.context,
        )

    @cached_property
    def trunk_hash(self) -> str:
        """The hash of the trunk's configuration, the same at all its points."""
        return self.job(with_text=False).config_hash

    @property
    def read(self) -> Read:
        """What the trunk has read here."""
        return Read(self.steps * self.recipe.batch_size, self.seed)

    @property
    def num_tokens(self) -> int:
        """Tokens to train on from the point before."""
        return (self.steps - self.since) * self.recipe.step_tokens

    @property
    def trunk_tokens(self) -> int:
        """Tokens of the trunk from its beginning."""
        return self.steps * self.recipe.step_tokens

    @property
    def key(self) -> str:
        """What identifies it among the tasks of a sweep."""
        return str(self.path)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"trunk {self.run.name} to {self.trunk_tokens:,} tokens"

    @property
    def folder(self) -> Path:
        """The directory of its losses and states, which all points of the trunk share."""
        return self.run / files.arm_dir(ARM, self.seed)

    @property
    def path(self) -> Path:
        """The file of its weights."""
        return self.run / f"d{self.trunk_tokens}.safetensors"

    def is_finished(self) -> bool:
        """Whether its weights are there."""
        return self.path.is_file()

    def weights_hash(self) -> str | None:
        """Return the hash of its weights, None where they are not there."""
        return file_hash(self.path)[:16] if self.is_finished() else None

    def train(self, accelerator: Accelerator) -> None:
        """Go on with the trunk up to this point, and keep its weights."""
        model = self.start.model(self.seed)
        run = RunDir.open(self.run)
        state = train_arm(run, model, self.job(), accelerator, pause_at=self.steps)
        # Clones: tied weights share memory, which the format has no word for.
        weights = {name: value.cpu().clone() for name, value in state["model"].items()}
        content = save(weights)
        write_atomic(self.path, lambda file: file.write(content))

    def outcome(self) -> tuple[float, float] | None:
        """Return its last training loss and the seconds since the point before, None unfinished."""
        if not self.is_finished():
            return None
        rows = pl.read_parquet(self.folder / files.METRICS_FILE).sort("step")
        seconds = rows.filter(pl.col("step").is_in([self.since, self.steps]))["seconds"].to_list()
        loss = rows.filter(step=self.steps)["loss"]
        return float(loss[0]), seconds[-1] - (seconds[0] if self.since else 0.0)

    def model(self) -> nn.Module:
        """Return the model with these weights; raise RunError where they cannot be read."""
        model = copy.deepcopy(self.start.model(self.seed))
        try:
            model.load_state_dict(load_file(self.path))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise RunError(
                f"{self.path} cannot be read ({error}): delete it to train the trunk again"
            ) from error
        return model
