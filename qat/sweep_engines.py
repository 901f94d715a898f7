"""Where the trainings of a sweep run: processes of this machine, or the workers of a Ray cluster.

An engine says what device a training has, how many run at once, and runs tasks. Ray (the extra
`bitplan[ray]`) keeps its workers' processes across tasks as the pool does, runs what a killed
worker or a lost machine left undone elsewhere, and hands out GPUs itself, a share of one to each of
`--workers`. Its machines need this package and the sweep's directory at the same path, on a file
system they share; that a training is never run by two is what the lock in sweep_work.py is for.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitplan.errors import BitplanError, TrainingError
from bitplan.options import SweepOptions, VerifyOptions
from bitplan.probe.checkpoint import resolve_device
from bitplan.qat.devices import training_devices
from bitplan.qat.pool import ATTEMPTS, run_tasks

Work = Callable[[Any, str], None]
Report = Callable[[Any], None]
Needs = Mapping[int, int]
"""A task's number to that of the one it waits for, which comes before it."""

REACH_S = 5.0
LOCAL_RAY = "local"
"""The address that stands for a cluster of this machine alone."""


@dataclass(frozen=True)
class Engine:
    """The type of device of every training, how many run at once, and what runs them."""

    device: str
    at_once: int
    run: Callable[[Sequence[Any], Work, Report, Needs], None]


@contextlib.contextmanager
def open_engine(options: SweepOptions) -> Iterator[Engine]:
    """Yield the engine that the options ask for.

    Raises BitplanError for devices that are not there, and where Ray is not.
    """
    if options.ray is not None:
        with _ray(options) as engine:
            yield engine
        return
    device = resolve_device(options.device)
    devices = training_devices(VerifyOptions(gpus=options.gpus, workers=options.workers), device)

    def run(tasks: Sequence[Any], work: Work, report: Report, needs: Needs) -> None:
        run_tasks(tasks, devices, work, "trainings", report, needs)

    yield Engine(device.type, len(devices), run)


@contextlib.contextmanager
def _ray(options: SweepOptions) -> Iterator[Engine]:
    try:
        import ray
    except ImportError:
        raise BitplanError("--ray needs the package ray: pip install 'bitplan[ray]'") from None
    if options.gpus is not None:
        raise BitplanError("--ray uses every GPU of its cluster: it goes without --gpus")
    assert options.ray is not None
    local: dict[str, Any] = {}
    if options.ray == LOCAL_RAY:
        local = {"num_cpus": options.workers or 1, "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _reach(options.ray)
        ray.init(address=options.ray, log_to_driver=False, logging_level="ERROR", **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise BitplanError(
            f"--ray {options.ray}: no cluster there ({error}); start one with `ray start --head`"
        ) from error
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        device = {"auto": "cuda" if gpus else "cpu"}.get(options.device, options.device)
        if device not in ("cpu", "cuda") or (device == "cuda" and not gpus):
            raise BitplanError(f"--device {device} with --ray: the cluster has {gpus} GPUs")
        workers = options.workers or 1
        share = {"num_gpus": 1 / workers} if device == "cuda" else {"num_cpus": 1.0}
        at_once = gpus * workers if device == "cuda" else int(resources.get("CPU", 1))

        def run(tasks: Sequence[Any], work: Work, report: Report, needs: Needs) -> None:
            _run_on(ray, tasks, work, report, needs, device, share)

        yield Engine(device, at_once, run)
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nothing answers at HOST:PORT, over which Ray takes minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()


def _run_on(
    ray: Any,
    tasks: Sequence[Any],
    work: Work,
    report: Report,
    needs: Needs,
    device: str,
    share: dict[str, float],
) -> None:
    """Call `work(task, device)` for every task on a cluster, in this order; none is lost.

    A task that needs another is handed over when that is done.
    """
    remote = ray.remote(max_retries=ATTEMPTS - 1, **share)(work)
    waiting: dict[Any, int] = {}

    def begin(after: int | None) -> None:
        for n, task in enumerate(tasks):
            if needs.get(n) == after:
                waiting[remote.remote(task, device)] = n

    begin(None)
    while waiting:
        for reference in ray.wait(list(waiting))[0]:
            number = waiting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except ray.exceptions.RayError as error:
                raise TrainingError(
                    f"a worker of the cluster died {ATTEMPTS} times over one training ({error}); "
                    "what is done stays: go on with fewer --workers"
                ) from error
            report(tasks[number])
            begin(number)
