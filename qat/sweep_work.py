"""One training of a sweep as a task for any process: this one, a pool's, or one of Ray's.

A task is small and pickles: paths, hashes and the recipe; weights are drawn and tokens read where
it runs. It may be run any number of times, by several processes at once: a lock on the arm's
directory, which the kernel drops with its holder, lets one train and makes the others wait and find
it finished. A training that cannot go on leaves failed.json with the reason and is no error here,
so that the other cells go on.
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

from bitplan.errors import BitplanError
from bitplan.qat import record as files
from bitplan.qat.arms import Formats
from bitplan.qat.recipe import Recipe
from bitplan.qat.start import Start
from bitplan.qat.sweep_tokens import Tokens
from bitplan.qat.train import Job, make_accelerator, train_arm
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

    def job(self, *, with_text: bool = True) -> Job:
        """Return the training; without its text it says its configuration alone."""
        sequences = self.recipe.steps * self.recipe.batch_size
        none = torch.empty(0, self.recipe.seq_len, dtype=torch.int64)
        return Job(
            arm=self.arm,
            seed=self.seed,
            formats=self.formats,
            quantizers=self.quantizers,
            recipe=self.recipe,
            train=self.tokens.train_ids(sequences, self.seed) if with_text else none,
            heldout=self.tokens.heldout_ids() if with_text else none,
            context=self.context,
        )

    @cached_property
    def config_hash(self) -> str:
        """The hash of the configuration: tasks that have it in common are one training."""
        return self.job(with_text=False).config_hash

    @property
    def num_tokens(self) -> int:
        """Training tokens."""
        return self.recipe.steps * self.recipe.batch_size * self.recipe.seq_len

    @property
    def folder(self) -> Path:
        """The arm's directory."""
        return self.run / files.arm_dir(self.arm, self.seed)

    def record(self) -> dict[str, Any] | None:
        """Return the record of the finished training, None where there is none."""
        return files.finished(RunDir.open(self.run), self.arm, self.seed, self.config_hash)

    def failure(self) -> str | None:
        """Return why the last training of this cell could not go on, None where it did not fail."""
        path = self.folder / FAILED_FILE
        return str(read_json(path)["error"]) if path.is_file() else None


def work(task: Task, device: str) -> None:
    """Train a cell that is not finished; where it cannot go on, say so in failed.json."""
    task.folder.mkdir(parents=True, exist_ok=True)
    with _claim(task.folder / CLAIM_FILE):
        if task.record() is not None:
            return
        (task.folder / FAILED_FILE).unlink(missing_ok=True)
        accelerator = make_accelerator(torch.device(device))
        model = task.start.model(task.seed)
        try:
            train_arm(RunDir.open(task.run), model, task.job(), accelerator)
        except BitplanError as error:
            write_json(task.folder / FAILED_FILE, {"error": str(error)})


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[None]:
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write(f"{socket.gethostname()} {os.getpid()}\n")
        handle.flush()
        yield
