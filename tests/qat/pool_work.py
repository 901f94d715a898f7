"""Tasks that other processes can import: what test_pool hands out."""

import os
import signal
import time
from pathlib import Path


def note(task: tuple[Path, int], device: str) -> None:
    """Leave a file that says which device and process ran the task."""
    folder, number = task
    (folder / f"{number}").write_text(f"{device} {os.getpid()}")


def die_once(task: tuple[Path, int], device: str) -> None:
    """Kill the worker at task 1, the first time it is run."""
    folder, number = task
    if number == 1 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    note(task, device)


def after(task: tuple[Path, int, int | None], device: str) -> None:
    """Note where a task begins before the one it needs is done; kill the worker at 1, once."""
    folder, number, needed = task
    if needed is not None and not (folder / f"{needed}").exists():
        (folder / f"early-{number}").touch()
    time.sleep(0.05)
    (note if device == "first" else die_once)((folder, number), device)


def die(task: tuple[Path, int], device: str) -> None:
    """Kill the worker at task 1, always."""
    if task[1] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    note(task, device)


def refuse(task: tuple[Path, int], device: str) -> None:
    """Raise at task 1."""
    if task[1] == 1:
        raise ValueError("task 1 is refused")
    note(task, device)


def stay(task: tuple[Path, int], device: str) -> None:
    """Say who runs it and take minutes."""
    note(task, device)
    time.sleep(300)
