"""The moving parts of one arm: model, optimizer, recorder, and the state to go on from.

Several processes share each batch, as consecutive rows, and the held-out text; each holds the whole
model (DDP) or a shard (FSDP2, sharded.py). The first one alone writes files, but for shards.

A step depends on the weights, the optimizer's state and its own index alone. So a state written
every minute (state.py) is enough to go on after a kill with the very losses an uninterrupted run
would have.
"""

import contextlib
import copy
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from bitplan.errors import DivergedError, RunError
from bitplan.probe.checkpoint import num_non_embedding_parameters
from bitplan.probe.modules import find_linears
from bitplan.probe.ranks import whole_tensor
from bitplan.probe.recorder import Recorder
from bitplan.progress import say, track
from bitplan.qat import record as files
from bitplan.qat.average import TailAverage
from bitplan.qat.convert import convert, weights_held
from bitplan.qat.job import Job, rows_at_once
from bitplan.qat.recipe import make_optimizer, sequence_losses, share_of_peak
from bitplan.qat.sharded import check_shardable, follow_shards, is_sharding
from bitplan.qat.state import Writers, find_states, placed, read_state, remove_states, write_state
from bitplan.qat.step import Step
from bitplan.rundir import RunDir, hardware
from bitplan.tables import HELDOUT, METRICS, PROFILE


class Training:
    """The moving parts of one arm: model, optimizer, and the rows written so far."""

    def __init__(self, run: RunDir, model: nn.Module, job: Job, accelerator: Accelerator) -> None:
        self.directory = run
        self.job = job
        self.accelerator = accelerator
        self.path = run.path / files.arm_dir(job.arm, job.seed)
        self.last_state: Path | None = None
        plain = copy.deepcopy(model)
        if is_sharding(accelerator):
            check_shardable(plain)  # and it is not moved: the whole may not fit
        else:
            plain.to(accelerator.device)
        if (config := getattr(plain, "config", None)) is not None:
            config.use_cache = False  # keys and values are for generation; here they cost memory
        self.params = num_non_embedding_parameters(plain)
        self.sites = len(convert(plain, job.formats, job.quantizers).converted)
        # Experts without tokens have no gradient: DDP has to look for them.
        has_experts = any(item.linear.expert is not None for item in find_linears(plain))
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=has_experts)
        self.model, self.optimizer = accelerator.prepare(plain, make_optimizer(plain, job.recipe))
        self.plain: nn.Module = accelerator.unwrap_model(self.model)
        if is_sharding(accelerator):
            follow_shards(self.plain)
        recipe = job.recipe
        self.average = TailAverage(self.plain, steps=recipe.steps, share=recipe.average_tail)
        self.step = 0
        self.last = recipe.steps
        self.metrics: list[dict[str, float]] = []
        every = max(1, job.recipe.steps // job.recipe.records)
        self.recorder = Recorder(self.plain, every, drift=True, restart=False)
        self.passes = Step(
            self.forward_and_backward,
            self.plain,
            capture=recipe.compiled,
            compiled=recipe.compiled,
            unhooked=self.recorder.hidden,
        )
        self.earlier = PROFILE.frame([])  # statistics from before an interruption
        self.start = time.monotonic()

    @property
    def stats(self) -> pl.DataFrame:
        """Statistics recorded so far, the columns of tables.PROFILE."""
        return pl.concat([self.earlier, self.recorder.frame()])

    @property
    def seconds(self) -> float:
        """Time since the arm started, interruptions left out."""
        return time.monotonic() - self.start

    def run(self, save_every_s: float) -> None:
        """Take the steps that are left."""
        saved = time.monotonic()
        label = f"{self.job.arm}, seed {self.job.seed}"
        for step in track(range(self.step, self.last), label):
            self.take_step(step)
            self.average.add(step)
            (is_due,) = broadcast_object_list([time.monotonic() - saved >= save_every_s])
            if is_due and self.step < self.last:
                self.save()
                saved = time.monotonic()

    def take_step(self, step: int) -> None:
        """Train on one batch; every process takes its share of the rows."""
        recipe, share = self.job.recipe, share_of_peak(step, self.job.recipe)
        # The index alone decides about dropout: arms share their masks, and a resumed run has them.
        process = self.accelerator.process_index
        torch.manual_seed(self.job.seed * 1_000_003 + step + (process << 32))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        batch = self.batch(step)
        self.model.train()
        loss, norm = self.passes(batch, recorded=(step + 1) % self.recorder.every == 0)
        value = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            self.fail(step, value, batch)
        self.optimizer.step()
        self.recorder.step()
        self.step = step + 1
        self.metrics.append(
            {
                "step": self.step,
                "tokens": self.step * recipe.step_tokens,
                "loss": value,
                "lr": recipe.lr * share,
                "grad_norm": float(norm),
                "seconds": self.seconds,
            }
        )

    def batch(self, step: int) -> Tensor:
        """Return the rows of a step that this process trains on, consecutive ones."""
        size = self.job.recipe.batch_size
        rows = self.job.train[step * size : (step + 1) * size]
        mine: Tensor = rows.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        return mine.to(self.accelerator.device)

    def forward_and_backward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Leave clipped gradients of a batch; return its loss and their norm before clipping."""
        loss = self.backward(batch)
        parameters = self.model.parameters()
        norm = self.accelerator.clip_grad_norm_(parameters, self.job.recipe.clip_norm)
        return loss, whole_tensor(norm)

    def backward(self, batch: Tensor) -> Tensor:
        """Add the gradients of this process's rows [sequences, seq_len]; return their mean loss."""
        parts = torch.split(batch, rows_at_once(self.job, self.accelerator))
        total = torch.zeros((), device=batch.device)
        # Weights are rounded once for all parts; gathered from shards they are others each time.
        is_held = len(parts) > 1 and not is_sharding(self.accelerator)
        with weights_held(self.plain) if is_held else contextlib.nullcontext():
            for i, part in enumerate(parts, 1):
                # Gradients are joined across processes once.
                apart = i < len(parts)
                with self.accelerator.no_sync(self.model) if apart else contextlib.nullcontext():
                    loss = self.losses(self.model, part).mean() * (len(part) / len(batch))
                    self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def losses(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the loss of each sequence, in the precision of training."""
        # Accelerate puts autocast into the models that it prepares, but for FSDP2's.
        sharding = is_sharding(self.accelerator)
        compiled = self.job.recipe.compiled and model.training
        with self.accelerator.autocast() if sharding else contextlib.nullcontext():
            return sequence_losses(model, ids, compiled=compiled)

    def fail(self, step: int, loss: float, batch: Tensor) -> None:
        """Keep the weights if they are good; raise DivergedError that names the first bad site."""
        sites = gather_object([_first_non_finite(self.plain, batch.to(self.accelerator.device))])
        site = next(filter(None, sites), None)
        finite = [bool(torch.isfinite(p.detach()).all()) for p in self.plain.parameters()]
        if self.step > 0 and all(gather_object([all(finite)])):
            self.save()
        reason = (
            f"the loss is {loss} at step {step + 1} of {self.last}; first site that is "
            f"not finite: {site or 'none, the gradient is'}; lower --lr "
            f"(now {self.job.recipe.lr:g})"
        )
        if self.accelerator.is_main_process:
            job = self.job
            files.stop(self.directory, job.arm, job.seed, job.config_hash, reason)
        raise DivergedError(f"arm {self.job.arm}, seed {self.job.seed}: {reason}")

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Return the held-out sequences' losses, in order; every process takes its share."""
        self.plain.eval()
        batches = torch.split(self.job.heldout, rows_at_once(self.job, self.accelerator))
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        found: dict[int, list[float]] = {}
        label = f"{self.job.arm}, seed {self.job.seed}, held-out text"
        for first in track(range(0, len(batches), processes), label):
            # All make as many passes, as shards are gathered in each; the last is made twice.
            index = min(first + own, len(batches) - 1)
            losses = self.losses(self.plain, batches[index].to(self.accelerator.device))
            found[index] = losses.tolist()
        merged: dict[int, list[float]] = {}
        for part in gather_object([found]):
            merged |= part
        return [loss for index in sorted(merged) for loss in merged[index]]

    def save(self) -> None:
        """Write the state from which `resume` goes on; the one before it stays."""
        buffer = io.BytesIO()
        self.stats.write_parquet(buffer)
        state = {
            "config_hash": self.job.config_hash,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "metrics": self.metrics,
            "stats": torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8),
        }
        writers = Writers.of(state, self.accelerator.process_index)
        path = write_state(self.path, self.step, state, processes=writers)
        if self.accelerator.is_main_process:
            remove_states(self.path, keep=(path, self.last_state or path))
        self.last_state = path

    def resume(self) -> None:
        """Go on from the last state of an interrupted training of this job that can be read."""
        (path,) = broadcast_object_list([self.find_state()])
        if path is None:
            return
        state = read_state(path)
        own = self.plain.state_dict()

        def here(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: placed(value, own[name]) for name, value in values.items()}

        self.plain.load_state_dict(here(state["model"]))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        optimizer = state["optimizer"]
        optimizer["state"] = {
            index: {name: placed(value, parameters[index]) for name, value in values.items()}
            for index, values in optimizer["state"].items()
        }
        self.optimizer.load_state_dict(optimizer)
        average = state["average"]
        self.average.load_state_dict(average | {"mean": here(average["mean"])})
        self.last_state = path
        self.step = state["step"]
        self.start = time.monotonic() - state["seconds"]
        self.metrics = state["metrics"]
        self.recorder.steps = self.step
        self.earlier = pl.read_parquet(io.BytesIO(state["stats"].numpy().tobytes()))

    def find_state(self) -> Path | None:
        """Return the last state of this job that can be read; the first process decides.

        Raises RunError where there are states and none can be read.
        """
        if not self.accelerator.is_main_process:
            return None
        unread: RunError | None = None
        for path in find_states(self.path):
            try:
                state = read_state(path)
            except RunError as error:
                unread = error
                continue
            if state["config_hash"] != self.job.config_hash:
                return None
            if state["step"] > self.last:  # of a part that paused later
                continue
            if unread is not None:
                say(f"{unread}; going on from the state before it, {path.name}")
            return path
        if unread is not None:
            raise unread
        return None

    def pause(self) -> dict[str, Any]:
        """Write the state and the metrics so far; return the state."""
        self.save()
        assert self.last_state is not None
        if self.accelerator.is_main_process:
            remove_states(self.path, keep=(self.last_state,))
            place = files.arm_dir(self.job.arm, self.job.seed)
            name = f"{place}/{files.METRICS_FILE}"
            self.directory.write_table(name, METRICS.frame(self.metrics))
        self.accelerator.wait_for_everyone()
        return read_state(self.last_state)

    def finish(self) -> dict[str, Any]:
        """Evaluate, write the arm's files, the record last, and return the record."""
        job, recipe = self.job, self.job.recipe
        self.average.apply()
        losses = self.evaluate()
        if not all(map(math.isfinite, losses)):
            bad = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
            self.fail(recipe.steps - 1, losses[bad], job.heldout[bad : bad + 1])
        record = {
            "schema": self.directory.manifest["schema"],
            "arm": job.arm,
            "seed": job.seed,
            "same_as": None,
            "config_hash": self.job.config_hash,
            "config": job.config,
            "steps": recipe.steps,
            "tokens": recipe.tokens,
            "num_quantized_sites": self.sites,
            "num_non_embedding_parameters": self.params,
            "loss": {
                "heldout": sum(losses) / len(losses),
                "train_last": self.metrics[-1]["loss"],
            },
            "seconds": self.seconds,
            "captured": self.passes.is_captured,
            "refusal": self.passes.refusal,
            "hardware": _hardware(self.accelerator),
            "provenance": self.directory.provenance(),
        }
        if self.accelerator.is_main_process:
            place = files.arm_dir(job.arm, job.seed)
            heldout = [{"sequence": i, "loss": loss} for i, loss in enumerate(losses)]
            write = self.directory.write_table
            write(f"{place}/{files.METRICS_FILE}", METRICS.frame(self.metrics))
            write(f"{place}/{files.STATS_FILE}", self.stats)
            write(f"{place}/{files.HELDOUT_FILE}", HELDOUT.frame(heldout))
            self.directory.write_json(f"{place}/{files.RECORD_FILE}", record)
            files.clean(self.directory, job.arm, job.seed)
        self.accelerator.wait_for_everyone()
        return record


def _hardware(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    return hardware()


@torch.no_grad()
def _first_non_finite(model: nn.Module, batch: Tensor) -> str | None:
    """Return the first site, in the order of the forward pass, that holds a NaN or an infinity."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if not found and not torch.isfinite(module.weight).all():
                found.append(f"{name}:weight")
            if not found and args[0].is_floating_point() and not torch.isfinite(args[0]).all():
                found.append(f"{name}:input")

        return hook

    handles = [
        item.module.register_forward_pre_hook(look(item.linear.module))
        for item in find_linears(model)
    ]
    try:
        model.eval()
        model(input_ids=batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
