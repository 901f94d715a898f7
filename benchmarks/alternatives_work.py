"""Measuring and training choices, in a process per device; see alternatives.py."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl
import torch
from alternatives_choose import Sites
from torch import Tensor

from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.text import Split, load_text, tokenize
from bitplan.progress import track
from bitplan.qat.convert import convert, restore
from bitplan.qat.job import Job
from bitplan.qat.recipe import Recipe
from bitplan.qat.record import HELDOUT_FILE, arm_dir
from bitplan.qat.train import make_accelerator, train_arm
from bitplan.rundir import RunDir, content_hash, hardware, write_atomic

# `key` identifies the model, the text and the recipe that a row's numbers depend on.
KEY = {"choice": pl.String, "key": pl.String, "hardware": pl.String}
MEASURED = {**KEY, "sequence": pl.Int64, "delta_loss": pl.Float64, "kl": pl.Float64}
TRAINED = {**KEY, "seed": pl.Int64, "sequence": pl.Int64, "loss": pl.Float64}
BATCH_TOKENS = 2048  # of a forward pass without training; logits are the largest tensors


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for on the command line."""

    model: str
    run: Path
    data: tuple[str, ...]
    measure_tokens: int
    peer_tokens: int
    seeds: int
    trained_draws: int
    eval_tokens: int
    recipe: Recipe

    def key(self, stage: str) -> str:
        """Identify what the rows of `measure` or `train` depend on beside the choice."""
        used: dict[str, dict[str, Any]] = {
            "measure": {"tokens": self.measure_tokens, "seq_len": self.recipe.seq_len},
            "train": {"tokens": self.eval_tokens}
            | {key: asdict(self.recipe)[key] for key in ("steps", "batch_size", "seq_len", "lr")},
        }
        text = load_text(self.data).content_hash
        return content_hash({"model": Path(self.model).name, "text": text, **used[stage]})

    def ids(self, tokenizer: Any, split: Split, tokens: int, seed: int = 0) -> Tensor:
        length = self.recipe.seq_len
        return tokenize(
            load_text(self.data), tokenizer, split, tokens=tokens, seq_len=length, seed=seed
        )

    def heldout(self, tokenizer: Any, tokens: int) -> Tensor:
        return self.ids(tokenizer, "heldout", tokens)


class Worker:
    """A process's model on its device, and the texts that it needs again and again."""

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings, self.device = settings, torch.device(device)
        self.checkpoint = load_checkpoint(settings.model, device="cpu")
        self.sites = Sites.read(RunDir.open(settings.run))

    @cached_property
    def heldout(self) -> list[Tensor]:
        """Batches of held-out sequences for `measure`."""
        tokens = self.settings.measure_tokens
        ids = self.settings.heldout(self.checkpoint.tokenizer, tokens).to(self.device)
        return list(torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1])))

    @cached_property
    @torch.no_grad()
    def base(self) -> list[Tensor]:
        """Log-probabilities of the unquantized model for each batch."""
        model = self.checkpoint.model.to(self.device).eval()
        return [model(input_ids=ids).logits.log_softmax(-1) for ids in self.heldout]

    @torch.no_grad()
    def measure(self, choice: str, raised: Sequence[str]) -> pl.DataFrame:
        """Return the change of loss and the KL of each held-out sequence, nats per token."""
        base = self.base
        model = self.checkpoint.model
        convert(model, self.sites.formats(raised))
        rows: list[Tensor] = []
        for ids, expected in zip(self.heldout, base, strict=True):
            difference = expected - model(input_ids=ids).logits.log_softmax(-1)
            kl = torch.linalg.vecdot(expected.exp(), difference)[:, :-1].double().mean(1)
            loss = difference[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].double().mean(1)
            rows.append(torch.stack([loss, kl], dim=1).cpu())
        restore(model)
        loss, kl = torch.cat(rows).T.numpy()
        columns = {"sequence": range(len(loss)), "delta_loss": loss, "kl": kl}
        return self._rows(pl.DataFrame(columns), "measure", choice).select(*MEASURED)

    @cached_property
    def accelerator(self) -> Any:
        return make_accelerator(self.device)

    def train(self, choice: str, raised: Sequence[str] | None, seed: int) -> pl.DataFrame:
        """Return the loss of each held-out sequence after training; `raised` is None for bf16."""
        settings, recipe = self.settings, self.settings.recipe
        self.__dict__.pop("base", None)  # makes room
        tokens = recipe.tokens
        job = Job(
            arm=choice,
            seed=seed,
            formats={} if raised is None else self.sites.formats(raised),
            quantizers={},
            recipe=recipe,
            train=settings.ids(self.checkpoint.tokenizer, "train", tokens, seed),
            heldout=settings.heldout(self.checkpoint.tokenizer, settings.eval_tokens),
        )
        with tempfile.TemporaryDirectory() as folder:
            run = RunDir.create(folder)
            train_arm(run, self.checkpoint.model.cpu(), job, self.accelerator)
            losses = run.read_table(f"{arm_dir(choice, seed)}/{HELDOUT_FILE}")
        losses = losses.with_columns(seed=pl.lit(seed, pl.Int64))
        return self._rows(losses, "train", choice).select(*TRAINED)

    def _rows(self, frame: pl.DataFrame, stage: str, choice: str) -> pl.DataFrame:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else hardware()
        return frame.with_columns(
            choice=pl.lit(choice), key=pl.lit(self.settings.key(stage)), hardware=pl.lit(name)
        )


_worker: Worker
_deadline: float
Call = tuple[str, tuple[Any, ...]]
"""A method of Worker and its arguments."""


def _start(settings: Settings, devices: Any, deadline: float) -> None:
    global _worker, _deadline
    _worker, _deadline = Worker(settings, devices.get()), deadline


def _call(method: str, arguments: tuple[Any, ...]) -> pl.DataFrame | None:
    if time.time() > _deadline:
        return None
    found: pl.DataFrame = getattr(_worker, method)(*arguments)
    return found


def spread(
    settings: Settings, calls: Sequence[Call], devices: Sequence[str], deadline: float
) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield what a Worker's methods return, a process for each device.

    Nothing is started after the deadline, in seconds of time.time(); what runs then is finished.
    """
    context = get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    with ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=_start, initargs=(settings, queue, deadline)
    ) as pool:
        method_of = {pool.submit(_call, *call): call[0] for call in calls}
        for future in track(as_completed(method_of), "choices", total=len(calls)):
            if (frame := future.result()) is not None:
                yield method_of[future], frame


def read(path: Path, schema: Mapping[str, Any], key: str) -> pl.DataFrame:
    """Return the rows of a key, none where there is no table yet."""
    table = pl.read_parquet(path) if path.exists() else pl.DataFrame(schema=dict(schema))
    return table.filter(key=key)


def add_rows(path: Path, frame: pl.DataFrame) -> None:
    """Add rows to a Parquet table."""
    table = pl.concat([pl.read_parquet(path), frame]) if path.exists() else frame
    write_atomic(path, lambda file: table.write_parquet(file, compression="zstd"))
