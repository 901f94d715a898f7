"""Trains the embedded checkpoint, a Llama of 2.75M parameters without embeddings.

    python benchmarks/embedded/train.py --data DIR --out DIR --tokens 400000000
    torchrun --nproc-per-node 8 benchmarks/embedded/train.py ...        # several GPUs

One number drives a run, its *progress* from 0 to 1: the share of the token budget or of the
clock budget (``--minutes``) that is spent, whichever is further. The learning rate is a function
of progress: constant after a short warmup, then linearly to zero over the last fifth
(warmup-stable-decay). So a run that must end by the clock ends fully decayed, and the trunk of a
run that was stopped before the decay can be continued under a larger budget.

The batch of a step depends on the seed and the step alone, not on the micro-batch or the number of
processes; a checkpoint is model, optimizer, step and seconds, and a killed run goes on from the
last one with the batches it would have seen. Processes average their gradients by hand: at four
million parameters a wrapper would hide more than it saves.

Master weights are fp32. The forward pass autocasts to bf16, on CPU as well: on two AMD EPYC cores
with avx512_bf16, eager fp32 ran 3.5k tokens/s, bf16 6.6k and compiled bf16 7.4k, in micro-batches
of 4 x 512 tokens; larger ones leave the cache and were slower. Where other programs want the same
cores, one process per core (torchrun, OMP_NUM_THREADS=1) meets once a step instead of once an
operation: about 2.5k against 1.5k tokens/s at a load of 7 to 8. Where tokens are few, a small batch
buys steps with them: over the first 2M tokens --batch 8 was 0.1 to 0.7 nats ahead of --batch 16.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import transformers
from corpus import (
    END_OF_TEXT,
    VOCABULARY_SIZE,
    Data,
    Tokens,
    replacing,
    tokenize,
    write_json,
)
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

logger = logging.getLogger("embedded.train")

DECAY_SHARE = 0.2
CHECKPOINT_SECONDS = 300.0
CHECKPOINT_HELD_OUT_WINDOWS = 64
SNAPSHOTS_KEPT = 3


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, hardware aside."""

    budget_tokens: int
    budget_minutes: float | None
    seed: int
    sequence_tokens: int
    batch_sequences: int
    peak_lr: float
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0

    @property
    def batch_tokens(self) -> int:
        return self.batch_sequences * self.sequence_tokens

    def progress(self, step: int, seconds: float) -> float:
        by_tokens = step * self.batch_tokens / self.budget_tokens
        by_clock = seconds / (60 * self.budget_minutes) if self.budget_minutes else 0.0
        return max(by_tokens, by_clock)

    def lr(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, max(0.0, (1.0 - progress) / DECAY_SHARE))
        return self.peak_lr * warmup * decay


@dataclass(frozen=True)
class Group:
    """The processes of one run; alone, it is the one process there is."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Group:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if size > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        return cls(rank, size, torch.device(device))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def mean(self, tensors: list[torch.Tensor]) -> None:
        """Averages each tensor over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.size

    def agree(self, value: float) -> float:
        """The leader's value: clocks differ between processes, decisions must not."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            initializer_range=0.02,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
            use_cache=True,
        )
    )


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=betas, fused=True)


def loss_of(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token of windows of (sequence + 1) tokens."""
    inputs, targets = window[:, :-1], window[:, 1:]
    with torch.autocast(window.device.type, torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a token stream, each with the token that follows it."""

    tokens: Tokens
    sequence_tokens: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_tokens

    def take(self, indices: list[int], device: torch.device) -> torch.Tensor:
        starts = np.array(indices)[:, None] * self.sequence_tokens
        window = self.tokens[starts + np.arange(self.sequence_tokens + 1)]
        return torch.from_numpy(window.astype(np.int64)).to(device)


def batch_indices(windows: int, batch: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """The windows of each step: every epoch another permutation, fixed by the seed."""
    steps_per_epoch = windows // batch
    epoch, step = divmod(first_step, steps_per_epoch)
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(windows)
        for first in range(step * batch, steps_per_epoch * batch, batch):
            yield order[first : first + batch].tolist()
        epoch, step = epoch + 1, 0


@torch.no_grad()
def held_out_loss(
    model: nn.Module, windows: Windows, device: torch.device, limit: int | None = None
) -> float:
    count = min(len(windows), limit or len(windows))
    total = 0.0
    for first in range(0, count, 8):
        indices = list(range(first, min(first + 8, count)))
        total += float(loss_of(model, windows.take(indices, device))) * len(indices)
    return total / count


# --- files -------------------------------------------------------------------------------------


def sync_directory(directory: Path) -> None:
    """Makes the files and the entries of a directory durable."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def export(model: LlamaForCausalLM, data: Data, directory: Path) -> None:
    """Writes model (bf16) and tokenizer as a directory that transformers loads."""
    directory.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(model).to("cpu", torch.bfloat16)
    rounded.config.dtype = torch.bfloat16
    rounded.save_pretrained(directory)
    shutil.copyfile(data.tokenizer, directory / "tokenizer.json")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
        },
    )
    sync_directory(directory)


def publish_snapshot(model: LlamaForCausalLM, data: Data, out: Path, step: int) -> None:
    """Points OUT/snapshot at a new complete directory; older ones stay a while for readers."""
    folder = out / "snapshots"
    export(model, data, folder / f"{step:07d}")
    link = out / f".snapshot.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to((folder / f"{step:07d}").relative_to(out), target_is_directory=True)
    os.replace(link, out / "snapshot")
    for old in sorted(folder.iterdir())[:-SNAPSHOTS_KEPT]:
        shutil.rmtree(old)


def write_metrics(rows: list[dict[str, float]], path: Path) -> None:
    with replacing(path) as file:
        pl.DataFrame(rows).write_parquet(file)


def hardware(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{torch.get_num_threads() * processes} CPU cores ({model})"


# --- run ---------------------------------------------------------------------------------------


@dataclass
class State:
    """What a run is made of; all of it is in a checkpoint."""

    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    metrics: list[dict[str, float]]
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        with replacing(path) as file:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "metrics": self.metrics,
                    "step": self.step,
                    "seconds": self.seconds,
                },
                file,
            )

    def load(self, path: Path, device: torch.device) -> None:
        saved = torch.load(path, map_location=device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.metrics = saved["metrics"]
        self.step, self.seconds = saved["step"], saved["seconds"]


def train(
    recipe: Recipe, data: Data, out: Path, group: Group, micro_sequences: int, compiled: bool
) -> None:
    torch.manual_seed(recipe.seed)
    model = build_model().to(group.device)
    state = State(model, build_optimizer(model, recipe), [])
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint, group.device)
        logger.info("resuming at step %d", state.step)

    windows = Windows(data.tokens(data.train), recipe.sequence_tokens)
    held_out = Windows(data.tokens(data.held_out), recipe.sequence_tokens)
    micro_loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = loss_of
    if compiled:
        micro_loss = torch.compile(loss_of, dynamic=False)
    if recipe.batch_sequences % (group.size * micro_sequences):
        raise ValueError("the batch must be a multiple of processes x micro-batch")
    own_sequences = recipe.batch_sequences // group.size
    parameters = list(model.parameters())
    started = time.monotonic() - state.seconds
    saved_at = state.seconds
    batches = batch_indices(len(windows), recipe.batch_sequences, recipe.seed, state.step)

    while (progress := group.agree(recipe.progress(state.step, state.seconds))) < 1.0:
        own = next(batches)[group.rank * own_sequences :][:own_sequences]
        lr = recipe.lr(state.step, progress)
        for settings in state.optimizer.param_groups:
            settings["lr"] = lr
        loss = torch.zeros((), device=group.device)
        for first in range(0, own_sequences, micro_sequences):
            window = windows.take(own[first : first + micro_sequences], group.device)
            part = micro_loss(model, window) * (micro_sequences / own_sequences)
            torch.autograd.backward(part)
            loss += part.detach()
        group.mean([loss, *(p.grad for p in parameters if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.seconds = time.monotonic() - started
        state.metrics.append(
            {
                "step": state.step,
                "tokens": state.step * recipe.batch_tokens,
                "loss": float(loss),
                "lr": lr,
                "grad_norm": float(norm),
                "seconds": state.seconds,
            }
        )
        if group.leads and state.step % 20 == 0:
            row = "step %(step)d tokens %(tokens)d loss %(loss).3f lr %(lr).2e norm %(grad_norm).2f"
            logger.info(row + " %(seconds).0f s", state.metrics[-1])
        if group.leads and state.seconds - saved_at >= CHECKPOINT_SECONDS:
            saved_at = state.seconds
            state.save(checkpoint)
            write_metrics(state.metrics, out / "metrics.parquet")
            publish_snapshot(model, data, out, state.step)
            loss_now = held_out_loss(model, held_out, group.device, CHECKPOINT_HELD_OUT_WINDOWS)
            logger.info("step %d held-out loss %.3f", state.step, loss_now)

    if group.leads:
        finish(recipe, data, out, group, state, held_out)


def finish(
    recipe: Recipe, data: Data, out: Path, group: Group, state: State, held_out: Windows
) -> None:
    """Exports the trained model and records how it came about."""
    state.save(out / "checkpoint.pt")
    write_metrics(state.metrics, out / "metrics.parquet")
    publish_snapshot(state.model, data, out, state.step)
    export(state.model, data, out / "final")
    # The loss of what ships: the weights as rounded to bf16.
    shipped = LlamaForCausalLM.from_pretrained(out / "final").to(group.device)
    config = json.loads((out / "final" / "config.json").read_text())
    write_json(
        out / "record.json",
        {
            "recipe": asdict(recipe),
            "model": config,
            "parameters": sum(p.numel() for p in shipped.parameters()),
            "steps": state.step,
            "tokens": state.step * recipe.batch_tokens,
            "seconds": round(state.seconds, 1),
            "held_out_loss_nats_per_token": held_out_loss(shipped, held_out, group.device),
            "uniform_loss_nats_per_token": math.log(VOCABULARY_SIZE),
            "held_out_tokens": len(held_out) * recipe.sequence_tokens,
            "hardware": hardware(group.device, group.size),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "data": data.read_manifest() | {"train_tokens": len(data.tokens(data.train))},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the embedded checkpoint.")
    parser.add_argument("--data", type=Path, required=True, help="directory made by corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="token budget")
    parser.add_argument("--minutes", type=float, help="clock budget, if that is spent earlier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--sequence", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences at once, a process")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    arguments = parser.parse_args()

    group = Group.join(arguments.device)
    level = logging.INFO if group.leads else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    data = Data(arguments.data)
    if group.leads and not data.train.exists():
        tokenize(data)
    group.agree(0.0)  # the others wait for the tokens
    recipe = Recipe(
        budget_tokens=arguments.tokens,
        budget_minutes=arguments.minutes,
        seed=arguments.seed,
        sequence_tokens=arguments.sequence,
        batch_sequences=arguments.batch,
        peak_lr=arguments.lr,
    )
    train(recipe, data, arguments.out, group, arguments.micro_batch, arguments.compile)
    group.leave()


if __name__ == "__main__":
    main()
