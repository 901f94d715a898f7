"""Tasks side by side: each is done, the dead are replaced, and none outlives the parent."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from bitplan.errors import TrainingError
from bitplan.qat.pool import run_tasks

from . import pool_work


def done(folder: Path) -> dict[int, list[str]]:
    return {int(f.name): f.read_text().split() for f in folder.iterdir() if f.name.isdigit()}


def test_one_device_needs_no_other_process(tmp_path: Path) -> None:
    run_tasks([(tmp_path, n) for n in range(3)], ["cpu"], pool_work.note, "tasks")
    assert {pid for _, pid in done(tmp_path).values()} == {str(os.getpid())}


def test_every_device_takes_its_share_and_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    devices = ["first", "second"]
    run_tasks([(tmp_path, n) for n in range(6)], devices, pool_work.die_once, "tasks")
    found = done(tmp_path)
    assert sorted(found) == list(range(6))
    assert {device for device, _ in found.values()} <= set(devices)
    assert str(os.getpid()) not in {pid for _, pid in found.values()}
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("devices", [["first"], ["first", "second", "third"]])
def test_a_task_waits_for_the_one_it_needs(tmp_path: Path, devices: list[str]) -> None:
    # A chain of three, an arm of each of its links, and one task alone that dies once.
    needs = {2: 0, 3: 2, 4: 0, 5: 2, 6: 3}
    tasks = [(tmp_path, n, needs.get(n)) for n in range(7)]
    run_tasks(tasks, devices, pool_work.after, "tasks", needs=needs)
    assert sorted(done(tmp_path)) == list(range(7))
    assert not list(tmp_path.glob("early-*"))


def test_a_task_that_always_kills_ends_in_an_error_and_the_others_stay(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"keep dying.*fewer --workers"):
        run_tasks([(tmp_path, n) for n in range(2)], ["a", "b"], pool_work.die, "tasks")
    assert 1 not in done(tmp_path)


def test_what_a_task_raises_comes_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 1 is refused"):
        run_tasks([(tmp_path, n) for n in range(3)], ["a", "b"], pool_work.refuse, "tasks")


def _parent(folder: Path) -> None:
    run_tasks([(folder, n) for n in range(2)], ["a", "b"], pool_work.stay, "tasks")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(tmp_path,))
    parent.start()
    deadline = time.monotonic() + 60
    while len(done(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(pid) for _, pid in done(tmp_path).values()]
    assert len(workers) == 2
    assert parent.pid is not None
    os.kill(parent.pid, how)  # to it alone
    parent.join()
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, workers))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
