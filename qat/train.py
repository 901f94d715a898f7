"""One arm: some steps of training from the checkpoint under its formats, then the held-out loss.

All arms share the recipe (recipe.py), the initial weights and, for a seed, the batches in their
order and the dropout masks; only the formats differ. Accelerate runs them: bf16 autocast on GPUs,
where several processes share each batch, and float32 on CPUs, where the same numbers everywhere
count more than speed (autocast took two thirds of the time on one CPU with bf16 instructions).

A step depends on the weights, the optimizer's state and its own index alone. So a state written
every minute is enough to go on after a kill with the very losses an uninterrupted run would have.
"""

import contextlib
import copy
import io
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from bitplan.errors import RunError, TrainingError
from bitplan.probe.checkpoint import num_non_embedding_parameters
from bitplan.probe.modules import find_linears
from bitplan.probe.recorder import Recorder
from bitplan.progress import track
from bitplan.qat import record as files
from bitplan.qat.arms import Formats
from bitplan.qat.average import TailAverage
from bitplan.qat.convert import convert
from bitplan.qat.recipe import Recipe, make_optimizer, sequence_losses, share_of_peak
from bitplan.qat.step import Step
from bitplan.rundir import RunDir, content_hash, hardware, write_atomic
from bitplan.sites import Site
from bitplan.tables import HELDOUT, METRICS, PROFILE

SAVE_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm and seed: what to train, on what, and the configuration that identifies it."""

    arm: str
    seed: int
    formats: Formats
    quantizers: Mapping[Site, str]
    """The sites whose scales are trained, and by which quantizer."""
    recipe: Recipe
    train: Tensor
    """[steps * batch_size, seq_len] token ids, in the order of training."""
    heldout: Tensor
    """[sequences, seq_len] token ids."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Hashes of checkpoint and text, device: whatever else the numbers depend on."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the result depends on, as a JSON value; the arm's name is no part of it."""
        return {
            "recipe": {**asdict(self.recipe), "betas": list(self.recipe.betas)},
            "seed": self.seed,
            "formats": {str(site): str(fmt) for site, fmt in self.formats.items()},
            "quantizers": {str(site): name for site, name in self.quantizers.items()},
            **self.context,
        }

    @cached_property
    def config_hash(self) -> str:
        """The hash of `config`: jobs that have it in common are one training."""
        return content_hash(self.config)


def make_accelerator(device: torch.device) -> Accelerator:
    """Return the Accelerator for a device: bf16 autocast on CUDA, float32 elsewhere."""
    precision = "bf16" if device.type == "cuda" else "no"
    # Accelerate takes a device of the user's choice from the environment only.
    chosen = {} if device.index is None else {"ACCELERATE_TORCH_DEVICE": str(device)}
    with patch_environment(**chosen):
        return Accelerator(cpu=device.type == "cpu", mixed_precision=precision)


def train_arm(
    run: RunDir,
    model: nn.Module,
    job: Job,
    accelerator: Accelerator,
    *,
    save_every_s: float = SAVE_EVERY_S,
) -> dict[str, Any]:
    """Train a copy of `model` as the job says, write the arm's files, and return its record.

    Goes on from the state of an interrupted training of the same job. Raises TrainingError where
    the loss stops being finite and where memory runs out; the last state stays in place.
    """
    if job.recipe.batch_size % accelerator.num_processes:
        raise TrainingError(
            f"{job.recipe.batch_size} sequences a step cannot be shared by "
            f"{accelerator.num_processes} processes: give a multiple of that with --batch-size"
        )
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _memory(job):
        training = _Training(run, model, job, accelerator)
        try:
            # Entered before the weights move: drift is told from those of the checkpoint.
            with training.recorder:
                training.resume()
                training.run(save_every_s)
                return training.finish()
        finally:
            del training.passes  # it and the training hold each other, and so the GPU's memory
            accelerator.free_memory()


@contextlib.contextmanager
def _memory(job: Job) -> Iterator[None]:
    """Turn running out of memory into advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        size = job.recipe.batch_size
        advice = f"--batch-size {size // 2}" if size > 1 else f"--seq-len {job.recipe.seq_len // 2}"
        raise TrainingError(
            f"arm {job.arm}, seed {job.seed}: out of memory with {size} sequences of "
            f"{job.recipe.seq_len} tokens a step: try {advice}"
        ) from error


class _Training:
    """The moving parts of one arm: model, optimizer, and the rows written so far."""

    def __init__(self, run: RunDir, model: nn.Module, job: Job, accelerator: Accelerator) -> None:
        self.directory = run
        self.job = job
        self.accelerator = accelerator
        self.path = run.path / files.arm_dir(job.arm, job.seed) / files.STATE_FILE
        plain = copy.deepcopy(model)
        if (config := getattr(plain, "config", None)) is not None:
            config.use_cache = False  # keys and values are for generation; here they cost memory
        self.params = num_non_embedding_parameters(plain)
        self.sites = len(convert(plain, job.formats, job.quantizers).converted)
        self.model, self.optimizer = accelerator.prepare(plain, make_optimizer(plain, job.recipe))
        self.plain: nn.Module = accelerator.unwrap_model(self.model)
        recipe = job.recipe
        self.average = TailAverage(self.plain, steps=recipe.steps, share=recipe.average_tail)
        self.step = 0
        self.metrics: list[dict[str, float]] = []
        every = max(1, job.recipe.steps // job.recipe.records)
        self.recorder = Recorder(self.plain, every, drift=True, restart=False)
        self.passes = Step(
            self.forward_and_backward,
            self.plain,
            capture=accelerator.device.type == "cuda" and accelerator.num_processes == 1,
            compiled=job.recipe.compiled,
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
        recipe, saved = self.job.recipe, time.monotonic()
        label = f"{self.job.arm}, seed {self.job.seed}"
        for step in track(range(self.step, recipe.steps), label):
            self.take_step(step)
            self.average.add(step)
            if time.monotonic() - saved >= save_every_s and self.step < recipe.steps:
                self.save()
                saved = time.monotonic()

    def take_step(self, step: int) -> None:
        """Train on one batch; every process takes its share of the rows."""
        recipe, share = self.job.recipe, share_of_peak(step, self.job.recipe)
        # The index alone decides about dropout: arms share their masks, and a resumed run has them.
        torch.manual_seed(self.job.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        rows = self.job.train[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        batch = mine.to(self.accelerator.device)
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
                "tokens": self.step * rows.numel(),
                "loss": value,
                "lr": recipe.lr * share,
                "grad_norm": float(norm),
                "seconds": self.seconds,
            }
        )

    def forward_and_backward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Leave clipped gradients of a batch; return its loss and their norm before clipping."""
        compiled = self.job.recipe.compiled and batch.is_cuda
        loss = sequence_losses(self.model, batch, compiled=compiled).mean()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.job.recipe.clip_norm)
        return loss.detach(), norm

    def fail(self, step: int, loss: float, batch: Tensor) -> None:
        """Raise TrainingError that names the first site which is not finite."""
        site = _first_non_finite(self.plain, batch)
        raise TrainingError(
            f"arm {self.job.arm}, seed {self.job.seed}: the loss is {loss} at step {step + 1} of "
            f"{self.job.recipe.steps}; first site that is not finite: "
            f"{site or 'none, the gradient is'}; lower --lr (now {self.job.recipe.lr:g})"
        )

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Return the held-out sequences' losses, in order."""
        self.plain.eval()
        batches = torch.split(self.job.heldout, self.job.recipe.batch_size)
        losses = [
            sequence_losses(self.plain, ids.to(self.accelerator.device)).cpu()
            for ids in track(batches, f"{self.job.arm}, seed {self.job.seed}, held-out text")
        ]
        return [float(loss) for loss in torch.cat(losses)]

    def save(self) -> None:
        """Write the state from which `resume` goes on."""
        if not self.accelerator.is_main_process:
            return
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
        write_atomic(self.path, lambda file: _write_state(state, file))

    def resume(self) -> None:
        """Go on from the state of an interrupted training of this job, if there is one."""
        state = _read_state(self.path)
        if state is None or state["config_hash"] != self.job.config_hash:
            return
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.step = state["step"]
        self.start = time.monotonic() - state["seconds"]
        self.metrics = state["metrics"]
        self.recorder.steps = self.step
        self.earlier = pl.read_parquet(io.BytesIO(state["stats"].numpy().tobytes()))

    def finish(self) -> dict[str, Any]:
        """Evaluate, write the arm's files, the record last, and return the record."""
        job, recipe = self.job, self.job.recipe
        self.average.apply()
        losses = self.evaluate()
        if not all(map(math.isfinite, losses)):
            self.fail(recipe.steps - 1, math.nan, job.heldout[: recipe.batch_size])
        record = {
            "schema": self.directory.manifest["schema"],
            "arm": job.arm,
            "seed": job.seed,
            "same_as": None,
            "config_hash": self.job.config_hash,
            "config": job.config,
            "steps": recipe.steps,
            "tokens": recipe.steps * recipe.batch_size * recipe.seq_len,
            "num_quantized_sites": self.sites,
            "num_non_embedding_parameters": self.params,
            "loss": {
                "heldout": sum(losses) / len(losses),
                "train_last": self.metrics[-1]["loss"],
            },
            "seconds": self.seconds,
            "captured": self.passes.is_captured,
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


def _write_state(state: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write a state; a full disk stays the OSError it is, which torch hides in a RuntimeError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _hardware(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    return hardware()


def _read_state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler meets: any of many classes
        raise RunError(
            f"{path} cannot be read ({error}): delete it to start this arm anew"
        ) from error
    return state


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
