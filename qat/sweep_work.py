"""One training of a sweep as a task for any process: this one, a pool's, or one of Ray's.

A task is small and pickles: paths, hashes and the recipe; weights are drawn, or those of its trunk
(sweep_trunk.py) read, and tokens, where it runs. It may be run any number of times, by several
processes at once: a lock on the arm's directory, which the kernel drops with its holder, lets one
train and makes the others wait and find it finished. A training that cannot go on leaves
failed.json with the reason and is no error here, so that the other cells go on.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from bitplan.errors import BitplanError, TrainingError
from bitplan.qat import record as files
from bitplan.qat.arms import Formats
from bitplan.qat.job import Job
from bitplan.qat.recipe import Recipe
from bitplan.qat.start import Start
from bitplan.qat.sweep_tokens import Tokens
from bitplan.qat.sweep_trunk import Point
from bitplan.qat.train import make_accelerator, train_arm
from bitplan.rundir import RunDir, read_json, write_json
from bitplan.sites import Site

FAILED_FILE = "failed.json"
CLAIM_FILE = ".claim"
"""A line, host and process, for each time that the cell was begun."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One cell, as another process can train it."""

    run: Path
    """The run directory."""
    start: Start
    arm: str
    seed: int
    formats: Formats
    quantizers: Mapping[Site, str]
    recipe: Recipe
    tokens: Tokens
    params: int
    context: Mapping[str, Any]
    """What the result depends on beside these: Job.context."""
    trunk: Point | None = None
    """What it goes on from; None: from scratch."""

    def job(self, *, with_text: bool = True) -> Job:
        """Return the training; without its text it says its configuration alone."""
        sequences = self.recipe.steps * self.recipe.batch_size
        after = None if self.trunk is None else self.trunk.read
        none = torch.empty(0, self.recipe.seq_len, dtype=torch.int64)
        return Job(
            arm=self.arm,
            seed=self.seed,
            formats=self.formats,
            quantizers=self.quantizers,
            recipe=self.recipe,
            train=self.tokens.train_ids(sequences, self.seed, after) if with_text else none,
            heldout=self.tokens.heldout_ids() if with_text else none,
            context=self.context,
        )

    @cached_property
    def config_hash(self) -> str:
        """The hash of the configuration: tasks that have it in common are one training."""
        return self.job(with_text=False).config_hash

    @property
    def key(self) -> str:
        """What identifies it among the tasks of a sweep."""
        return self.config_hash

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.run.name}/{self.arm}/seed-{self.seed}"

    @property
    def num_tokens(self) -> int:
        """Tokens to train on, those of a trunk not among them."""
        return self.recipe.tokens

    @property
    def trunk_tokens(self) -> int:
        """Tokens of the trunk, 0 from scratch."""
        return 0 if self.trunk is None else self.trunk.trunk_tokens

    @property
    def folder(self) -> Path:
        """The arm's directory."""
        return self.run / files.arm_dir(self.arm, self.seed)

    def record(self) -> dict[str, Any] | None:
        """Return the record of the finished training, None where there is none."""
        return files.finished(RunDir.open(self.run), self.arm, self.seed, self.config_hash)

    def is_finished(self) -> bool:
        """Whether it is trained, from the weights of its trunk that are here."""
        if self.record() is None:
            return False
        if self.trunk is None:
            return True
        began = files.trunk_weights(RunDir.open(self.run), self.arm, self.seed)
        return began == self.trunk.weights_hash()

    def train(self, accelerator: Accelerator) -> None:
        """Train the cell; raise TrainingError where its trunk is not there."""
        run = RunDir.open(self.run)
        model = self.start.model(self.seed) if self.trunk is None else self._branch(run, self.trunk)
        train_arm(run, model, self.job(), accelerator)

    def _branch(self, run: RunDir, trunk: Point) -> nn.Module:
        """Note what the arm begins from, and return it."""
        weights = trunk.weights_hash()
        if weights is None:
            raise TrainingError(f"{trunk.name}: {failure(trunk) or 'it is not there'}")
        files.begin_branch(run, self.arm, self.seed, weights)
        return trunk.model()

    def outcome(self) -> tuple[float, float] | None:
        """Return its loss and its seconds, None unfinished."""
        record = self.record()
        return None if record is None else (record["loss"]["heldout"], record["seconds"])


def failure(task: Task | Point) -> str | None:
    """Return why the last training of a task could not go on, None where it did not fail."""
    path = task.folder / FAILED_FILE
    return str(read_json(path)["error"]) if path.is_file() else None


def work(task: Task | Point, device: str) -> None:
    """Train what is not finished; where it cannot go on, say so in failed.json."""
    task.folder.mkdir(parents=True, exist_ok=True)
    with _claim(task.folder / CLAIM_FILE):
        if task.is_finished():
            return
        (task.folder / FAILED_FILE).unlink(missing_ok=True)
        try:
            task.train(make_accelerator(torch.device(device)))
        except BitplanError as error:
            write_json(task.folder / FAILED_FILE, {"error": str(error)})


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[None]:
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write(f"{socket.gethostname()} {os.getpid()}\n")
        handle.flush()
        yield
