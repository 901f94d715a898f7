"""Tasks in processes of their own, each with a device, and none lost.

One task after another is handed to whichever process is free; one that needs another waits until
that is done, and others go first meanwhile. A process that dies (killed, out of memory) takes the
pool with it: the pool is made again and what was not finished is run again, twice at the most, so
that a task has to be one that can be repeated. Where a task raises, what runs is let finish, what
waits is dropped, and the error comes out; Ctrl-C ends the workers at once. If this process dies, so
do they. With one device there is no other process at all.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from bitplan import progress
from bitplan.errors import TrainingError

ATTEMPTS = 3
_device = ""


def run_tasks(
    tasks: Sequence[Any],
    devices: Sequence[str],
    work: Callable[[Any, str], None],
    label: str,
    report: Callable[[Any], None] | None = None,
    needs: Mapping[int, int] | None = None,
) -> None:
    """Call `work(task, device)` for every task, on all devices at once; one may be named twice.

    Tasks and `work` must pickle. `report` is told each task that is done, here, in the place of a
    count of them. needs: a task's number to that of the one it waits for, which comes before it in
    the list. Raises what a task raises, and TrainingError where processes keep dying.
    """
    assert all(first < second for second, first in (needs or {}).items())
    if len(devices) == 1 or len(tasks) == 1:
        for task in tasks:
            work(task, devices[0])
            if report:
                report(task)
        return
    left = list(range(len(tasks)))
    for attempt in range(1, ATTEMPTS + 1):
        left = _run_pool(tasks, left, devices, work, label, report, needs or {})
        if not left:
            return
        if attempt == ATTEMPTS:
            raise TrainingError(
                f"{label}: {len(devices)} processes side by side keep dying, as they do when "
                f"memory runs out; {len(tasks) - len(left)} of {len(tasks)} are done and stay: "
                "go on with fewer --workers"
            )


def _run_pool(
    tasks: Sequence[Any],
    numbers: Sequence[int],
    devices: Sequence[str],
    work: Callable[[Any, str], None],
    label: str,
    report: Callable[[Any], None] | None,
    needs: Mapping[int, int],
) -> list[int]:
    """Run the tasks of these numbers; return those that a dead process left undone."""
    # Forked processes cannot use CUDA, nor the threads of this one.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    used = devices[: len(numbers)]
    for device in used:
        queue.put(device)
    threads = max(1, _threads() // len(used))
    undone = dict.fromkeys(numbers)
    with ProcessPoolExecutor(
        len(used), mp_context=context, initializer=_enter, initargs=(queue, threads)
    ) as pool:
        running: dict[Future[None], int] = {}

        def ended() -> Iterator[int]:
            """Yield what is done, and keep every process busy with the first that may begin."""
            waiting = list(numbers)
            while waiting or running:
                may_begin = [n for n in waiting if needs.get(n) not in undone]
                for n in may_begin[: len(used) - len(running)]:
                    waiting.remove(n)
                    running[pool.submit(_call, work, tasks[n])] = n
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    n = running.pop(future)
                    del undone[n]
                    yield n

        try:
            for n in ended() if report else progress.track(ended(), label, total=len(undone)):
                if report:
                    report(tasks[n])
        except BrokenProcessPool:
            finished = [f for f in running if f.done() and not f.cancelled() and not f.exception()]
            return sorted(set(undone) - {running[f] for f in finished})
        except KeyboardInterrupt:
            # A worker may be in code that swallows its own; what it trains is known by its state.
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return list(undone)


def _threads() -> int:
    """Return the threads that this process may use, as torch counts them."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _enter(queue: Any, threads: int) -> None:
    """Begin a worker: take a device, a share of the threads, and end when the parent does."""
    global _device
    _device = queue.get()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    progress.silence()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _call(work: Callable[[Any, str], None], task: Any) -> None:
    work(task, _device)
