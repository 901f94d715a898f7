"""One arm: some steps of training from the checkpoint under its formats, then the held-out loss.

All arms share the recipe (recipe.py), the initial weights and, for a seed, the batches in their
order and the dropout masks; only the formats differ. Accelerate runs them: bf16 autocast on GPUs
and float32 on CPUs, where the same numbers everywhere count more than speed (autocast took two
thirds of the time on one CPU with bf16 instructions). training.py takes the steps; where memory
runs out, this says how many sequences at once would fit.
"""

import gc
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from bitplan.errors import TrainingError
from bitplan.qat.job import Job, rows_at_once
from bitplan.qat.sharded import check_launch, gather_in_float32
from bitplan.qat.training import Training
from bitplan.rundir import RunDir

SAVE_EVERY_S = 60.0


def make_accelerator(device: torch.device) -> Accelerator:
    """Return the Accelerator for a device: bf16 autocast on CUDA, float32 elsewhere."""
    precision = "bf16" if device.type == "cuda" else "no"
    # Accelerate takes a device of the user's choice from the environment only.
    chosen = {} if device.index is None else {"ACCELERATE_TORCH_DEVICE": str(device)}
    with patch_environment(**chosen):
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    gather_in_float32(accelerator)
    return accelerator


def train_arm(
    run: RunDir,
    model: nn.Module,
    job: Job,
    accelerator: Accelerator,
    *,
    save_every_s: float = SAVE_EVERY_S,
    pause_at: int | None = None,
) -> dict[str, Any]:
    """Train a copy of `model` as the job says, write the arm's files, and return its record.

    Goes on from the state of an interrupted training of the same job. pause_at: the first steps
    only; their state stays for a later call to go on from, and is what is returned. Raises
    TrainingError where the loss stops being finite and where memory runs out; the last state stays
    in place.
    """
    check_launch(accelerator)
    if job.recipe.compiled and (accelerator.device.type, accelerator.num_processes) != ("cuda", 1):
        raise TrainingError(
            f"compiled training is for one process on a GPU, and this is {accelerator.device} with "
            f"{accelerator.num_processes}: leave out --compiled (in a grid, compiled = true)"
        )
    if job.recipe.batch_size % accelerator.num_processes:
        raise TrainingError(
            f"{job.recipe.batch_size} sequences a step cannot be shared by "
            f"{accelerator.num_processes} processes: give a multiple of that with --batch-size"
        )
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            return _train(run, model, job, accelerator, save_every_s, pause_at)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            said = f"arm {job.arm}, seed {job.seed}: out of memory with {_passes(job, accelerator)}"
        # Outside the handler: its traceback holds what fills the memory.
        raise TrainingError(f"{said}: {_what_fits(run, model, job, accelerator)}")


def _train(
    run: RunDir,
    model: nn.Module,
    job: Job,
    accelerator: Accelerator,
    save_every_s: float,
    pause_at: int | None,
) -> dict[str, Any]:
    training = Training(run, model, job, accelerator)
    training.last = pause_at or job.recipe.steps
    try:
        # Entered before the weights move: drift is told from those of the checkpoint.
        with training.recorder:
            training.resume()
            training.run(save_every_s)
            return training.finish() if pause_at is None else training.pause()
    finally:
        del training.passes  # it and the training hold each other, and so the GPU's memory
        accelerator.free_memory()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def _passes(job: Job, accelerator: Accelerator) -> str:
    return f"{rows_at_once(job, accelerator)} sequences of {job.recipe.seq_len} tokens at once"


def _what_fits(run: RunDir, model: nn.Module, job: Job, accelerator: Accelerator) -> str:
    """Try a step in more and more parts; say how many are enough, or what else there is to do.

    Processes that train together cannot be tried one by one: there the next number is advised.
    """
    parts = job.accumulate
    while rows_at_once(job, accelerator) > 1:
        parts *= 2
        job = replace(job, accumulate=parts)
        rows = rows_at_once(job, accelerator)
        fits = accelerator.num_processes > 1 or _fits(run, model, job, accelerator)
        if fits:
            found = "try" if accelerator.num_processes > 1 else f"{_passes(job, accelerator)} fit:"
            enough = -(-job.recipe.batch_size // (accelerator.num_processes * rows))
            return f"{found} --accumulate {enough}, which trains the same"
    return f"try --seq-len {job.recipe.seq_len // 2}, or more GPUs (accelerate launch --use_fsdp)"


def _fits(run: RunDir, model: nn.Module, job: Job, accelerator: Accelerator) -> bool:
    """Take steps with a model that is thrown away; return whether memory was enough."""
    gc.collect()
    try:
        training = Training(run, model, job, accelerator)
        with training.recorder:
            for step in range(2):  # the optimizer's state is there from the first one on
                training.backward(training.batch(step % job.recipe.steps))
                training.optimizer.step()
                training.optimizer.zero_grad()
                training.recorder.step()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return False
    finally:
        accelerator.free_memory()
    return True
