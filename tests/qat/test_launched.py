"""Several processes train what one does, and whatever is killed goes on to the same weights."""

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from bitplan.options import VerifyOptions, spell
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.qat import record as files
from bitplan.qat.arms import ARMS
from bitplan.qat.job import Job
from bitplan.qat.recipe import Recipe
from bitplan.qat.verify import verify_plan
from bitplan.rundir import RunDir

from . import launched
from .conftest import make_plan
from .launched import Case

WORKER = Path(__file__).parent / "launched.py"
RECIPE = Recipe(steps=5, batch_size=4, seq_len=24, lr=1e-3)

WHOLE = (
    Case("one"),
    Case("two", 2),
    Case("four", 4),
    Case("one-in-parts", accumulate=3),
    Case("two-in-parts", 2, accumulate=2),
    Case("two-sharded", 2, sharded=True),
    Case("two-sharded-in-parts", 2, sharded=True, accumulate=2),
)
# Who is killed, and where; all processes of a launch die with one.
OF_TWO = (
    ("as the fourth step begins", 1),
    ("within the third write", 0),
    ("before the record is written", 0),
)
OF_SHARDED = (
    ("within the third write", 0),
    ("within the third write", 1),
    ("before a state is in its place", 0),
)
KILLED = (
    *(Case(f"one-killed-{i}", kill=kill) for i, kill in enumerate(launched.KILLS)),
    *(Case(f"two-killed-{i}", 2, kill=kill, kill_rank=r) for i, (kill, r) in enumerate(OF_TWO)),
    *(
        Case(f"two-sharded-killed-{i}", 2, sharded=True, kill=kill, kill_rank=r)
        for i, (kill, r) in enumerate(OF_SHARDED)
    ),
)


@pytest.fixture(scope="module")
def job(checkpoints: Callable[[str], Path]) -> Job:
    """A job that trains the scales of every site, some of which q, k and v share."""
    model = load_checkpoint(str(checkpoints("llama")), device="cpu").model
    formats = ARMS["planned"].formats(make_plan(model, {}, high=("fc2",)))
    generator = torch.Generator().manual_seed(0)
    return Job(
        arm="planned",
        seed=3,
        formats=formats,
        quantizers={
            site: ("lac" if site.operand == "input" else "lsq" if i % 3 else "lwc")
            for i, site in enumerate(formats)
        },
        recipe=RECIPE,
        train=torch.randint(0, 257, (20, 24), generator=generator),
        heldout=torch.randint(0, 257, (11, 24), generator=generator),
    )


@pytest.fixture(scope="module")
def runs(
    job: Job, checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What all cases left, in one start of Python."""
    root = tmp_path_factory.mktemp("launched")
    model = load_checkpoint(str(checkpoints("llama")), device="cpu").model
    empty = RunDir.create(root / "empty")
    with empty.lock():
        empty.finish("profile", {}, [])
    # Cases as plain values: their class has another name where the worker is the main module.
    cases = [asdict(case) for case in (*WHOLE, *KILLED)]
    (root / "given.pkl").write_bytes(pickle.dumps((model, job, cases)))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(root)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root


def tables(root: Path, name: str) -> dict[str, pl.DataFrame]:
    place = root / name / launched.ARMS
    return {
        table: pl.read_parquet(place / table).drop("seconds", strict=False)
        for table in files.TABLE_FILES
    }


@pytest.mark.parametrize("case", WHOLE[1:], ids=lambda case: case.name)
def test_any_number_of_processes_trains_what_one_does(runs: Path, case: Case) -> None:
    found, want = tables(runs, case.name), tables(runs, "one")
    for name, frame in want.items():
        assert_frame_equal(found[name], frame, rel_tol=2e-4, abs_tol=1e-5)


@pytest.mark.parametrize("case", KILLED, ids=lambda case: f"{case.name}: {case.kill}")
def test_a_killed_training_ends_in_the_same_weights_to_the_bit(runs: Path, case: Case) -> None:
    whole = case.name.partition("-killed")[0]
    assert (runs / case.name / "weights").read_text() == (runs / whole / "weights").read_text()
    for name, frame in tables(runs, whole).items():
        assert tables(runs, case.name)[name].equals(frame), name
    left = {path.name for path in (runs / case.name / launched.ARMS).iterdir()}
    assert left == {*files.TABLE_FILES, files.RECORD_FILE}


def launch(run: Path, options: VerifyOptions, processes: int = 2) -> list[tuple[int, str, str]]:
    """Run `python -m bitplan verify` as a launcher does; exit code, stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "bitplan", "verify", str(run)),
                *spell(VerifyOptions, asdict(options)),
            ],
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            | {name: str(value) for name, value in shared.items()}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, said, strict=True)]


def test_a_launched_verify_is_one_verify(ready: Callable[..., Any]) -> None:
    asked = {"arms": ("bf16", "w4a4"), "seeds": 1}
    alone, two = ready(**asked), ready(name="two", **asked)
    want = verify_plan(alone.run, alone.options)
    first, second = launch(two.run, two.options)
    assert (first[0], second[0]) == (1, 1), (first, second)  # undetermined: arms are missing
    assert first[1].startswith(want.as_text().splitlines()[0])
    assert first[1].count("undetermined") == 1
    assert second[1] == ""
    verdict = json.loads((two.run / "verdict.json").read_text())
    for arm in want.arms:
        assert verdict["arms"][arm.name]["loss"] == pytest.approx(arm.loss, rel=1e-4)
        for table in files.TABLE_FILES:
            found, expected = (
                pl.read_parquet(at.run / files.arm_dir(arm.name, 0) / table) for at in (two, alone)
            )
            seconds = "seconds"
            assert_frame_equal(
                found.drop(seconds, strict=False),
                expected.drop(seconds, strict=False),
                rel_tol=2e-4,
                abs_tol=1e-5,
            )
    # It is up to date for one process too.
    assert verify_plan(two.run, two.options).up_to_date


def test_what_stops_the_first_process_stops_all_and_is_said_once(ready: Callable[..., Any]) -> None:
    at = ready(workers=2)
    first, second = launch(at.run, at.options)
    assert (first[0], second[0]) == (2, 2), (first, second)
    assert "error: --workers 2: the launcher says how many processes train" in first[2]
    assert "error:" not in second[2]
    assert not (at.run / "arms").exists()
