"""Trainings in processes of their own, some of them killed: launched.py DIRECTORY.

DIRECTORY/given.pkl holds a model, a job and cases. Each case is run in as many processes as it
says, forked from this one, so that torch is imported once; it leaves a run directory of its name.
"""

import hashlib
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from bitplan.qat import record as files
from bitplan.qat import state, train, training
from bitplan.rundir import RunDir

CPU = torch.device("cpu")
ARMS = "arms/planned/seed-3"


@dataclass(frozen=True)
class Case:
    """One training: in how many processes, sharded or not, and where the first try is killed."""

    name: str
    processes: int = 1
    sharded: bool = False
    accumulate: int = 1
    kill: str | None = None
    kill_rank: int = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(owner: Any, name: str, number: int, *, after: bool = False) -> None:
    """Replace a function by one that kills the process at a call, before or after it is made."""
    real, calls = getattr(owner, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            die()
        result = real(*args, **kwargs)
        if calls == number:
            die()
        return result

    setattr(owner, name, dying)


def die_within_write(number: int) -> None:
    """Kill the process when half of a piece of a state is on the disk."""
    real, calls = state._write, 0

    def dying(value: Any, file: Any) -> None:
        nonlocal calls
        calls += 1
        real(value, file)
        if calls == number:
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    state._write = dying


KILLS: dict[str, Callable[[], None]] = {
    "as the first step begins": lambda: die_at_call(training, "share_of_peak", 1),
    "as the fourth step begins": lambda: die_at_call(training, "share_of_peak", 4),
    "within the first write": lambda: die_within_write(1),
    "within the third write": lambda: die_within_write(3),
    "before a state is in its place": lambda: die_at_call(state.os, "replace", 6),
    "before the old state is removed": lambda: die_at_call(training, "remove_states", 3),
    "in the evaluation": lambda: die_at_call(training.Training, "evaluate", 1, after=True),
    "before the record is written": lambda: die_at_call(RunDir, "write_json", 1),
    "before the last state is removed": lambda: die_at_call(files, "clean", 1),
}


def use_fsdp2(accelerator: Any) -> None:
    """Shard as `accelerate launch --use_fsdp --fsdp_version 2` does, which knows GPUs alone."""
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )


def note_weights(directory: Path) -> None:
    """Leave a hash of the final weights beside the results."""
    real = training.Training.finish

    def noting(self: Any) -> Any:
        digest = hashlib.sha256()
        for name, value in sorted(self.plain.state_dict().items()):
            whole = training.whole_tensor(value)
            digest.update(name.encode() + whole.numpy().tobytes())
        if self.accelerator.is_main_process:
            (directory / "weights").write_text(digest.hexdigest())
        return real(self)

    training.Training.finish = noting


def work(case: Case, rank: int, directory: Path, meeting: Path, model: Any, job: Any) -> None:
    """Train in one process of a case."""
    torch.set_num_threads(1)
    if case.processes > 1:
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = str(rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ[name] = str(case.processes)
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=case.processes
        )
    accelerator = train.make_accelerator(CPU)
    if case.sharded:
        use_fsdp2(accelerator)
    note_weights(directory)
    job = replace(job, accumulate=case.accumulate)
    train.train_arm(RunDir.open(directory), model, job, accelerator, save_every_s=0)
    if case.processes > 1:
        dist.destroy_process_group()


def run(case: Case, directory: Path, model: Any, job: Any, kill: str | None) -> list[int]:
    """Run a case's processes; return their exit codes, after the first failure those of a kill."""
    meeting = directory / f"meeting-{kill is None}"
    children = []
    for rank in range(case.processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if kill is not None and rank == case.kill_rank:
                    KILLS[kill]()
                work(case, rank, directory, meeting, model, job)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] != 0:  # as a launcher does
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def main(root: Path) -> None:
    model, job, cases = pickle.loads((root / "given.pkl").read_bytes())
    for values in cases:
        case = Case(**values)
        directory = root / case.name
        shutil.copytree(root / "empty", directory)
        if case.kill is not None:
            codes = run(case, directory, model, job, case.kill)
            assert codes[case.kill_rank] == -signal.SIGKILL, (case, codes)
        codes = run(case, directory, model, job, None)
        assert not any(codes), (case, codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
