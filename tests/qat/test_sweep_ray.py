"""A sweep on a Ray cluster: the same losses as here, and a killed worker's training is done again.

Two nodes of one machine stand for two machines that share a file system.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitplan.errors import BitplanError
from bitplan.options import SweepOptions
from bitplan.qat.law_runs import read_sweep
from bitplan.qat.sweep import run_sweep

from .test_sweep import CPU, grid, losses
from .test_sweep_trunk import BRANCHED

__all__ = ["grid"]  # the fixture
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray leaves sockets to its own threads


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Start two nodes with a worker each."""
    pytest.importorskip("ray", reason="needs bitplan[ray]")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def begun(sweep: Path) -> dict[str, list[str]]:
    """Which processes began each cell."""
    return {
        str(path.parent.relative_to(sweep)): path.read_text().split("\n")[:-1]
        for path in sweep.glob("runs/*/arms/*/*/.claim")
    }


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_repeats_nothing(
    cluster: Any, grid: Callable[..., Path], tmp_path: Path
) -> None:
    path = grid(("tokens = [256]", "tokens = [16384]"), ("[16]", '[16, "row"]'))
    run_sweep(path, tmp_path / "here", CPU)
    out = tmp_path / "ray"
    killed: list[int] = []

    def kill() -> None:
        """Kill the worker of a cell that is under way."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            time.sleep(0.02)
            for cell, claims in begun(out).items():
                if claims and not (out / cell / "record.json").exists():
                    time.sleep(0.3)
                    if (out / cell / "record.json").exists():
                        continue
                    killed.append(int(claims[-1].split()[1]))
                    os.kill(killed[0], signal.SIGKILL)
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    found = run_sweep(path, out, SweepOptions(device="cpu", ray=cluster.address))
    killer.join()
    assert killed
    assert killed[0] != os.getpid()
    assert not found.failed
    assert losses(out) == pytest.approx(losses(tmp_path / "here"), rel=1e-5)
    assert read_sweep(out).height == 3
    times = sorted(len(claims) for claims in begun(out).values())
    assert times == [1, 1, 2]  # the killed one again, and no other
    pids = {claims[-1].split()[1] for claims in begun(out).values()}
    assert str(os.getpid()) not in pids


def test_an_address_without_a_cluster_is_one_line(
    grid: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="needs bitplan[ray]")
    with pytest.raises(BitplanError, match="no cluster there"):
        run_sweep(grid(), tmp_path / "sweep", SweepOptions(ray="127.0.0.1:1"))


def test_gpus_are_the_clusters_to_give(grid: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs bitplan[ray]")
    with pytest.raises(BitplanError, match="goes without --gpus"):
        run_sweep(grid(), tmp_path / "sweep", SweepOptions(ray="local", gpus=1))


def test_without_ray_the_extra_is_named(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(BitplanError, match=r"pip install 'bitplan\[ray\]'"):
        run_sweep(grid(), tmp_path / "sweep", SweepOptions(ray="local"))


@pytest.mark.slow
def test_arms_of_a_cluster_wait_for_their_point(
    cluster: Any, grid: Callable[..., Path], tmp_path: Path
) -> None:
    path = grid(extra=BRANCHED)
    run_sweep(path, tmp_path / "here", CPU)
    found = run_sweep(path, tmp_path / "ray", SweepOptions(device="cpu", ray=cluster.address))
    assert not found.failed
    assert losses(tmp_path / "ray") == pytest.approx(losses(tmp_path / "here"), rel=1e-5)
