"""Two processes, over gloo or on two GPUs, record what one that sees both their batches does."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from bitplan.probe import Recorder

WORKER = Path(__file__).parent / "two_ranks.py"


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_ranks", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices"),
]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """What the two processes wrote, all cases in one start of them."""
    directory = tmp_path_factory.mktemp("ranks")
    worker.device = torch.device(request.param)
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(directory), request.param],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(worker.WORLD)
    ]
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
    yield directory
    worker.device = torch.device("cpu")


def frames(directory: Path, case: str, rank: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    stats, errors = (
        pl.read_parquet(directory / case / f"{name}-{rank}.parquet") for name in ("stats", "errors")
    )
    return stats, errors


def alone(ranks: list[int]) -> Recorder:
    """One process that takes the batches of several ranks, rank after rank."""
    model = worker.make_model()
    recorder: Recorder = worker.record(model, model, ranks)
    return recorder


# Channels and formats are summed over a chunk's rows, and a shard is another chunk, in float32.
def assert_same(found: pl.DataFrame, want: pl.DataFrame) -> None:
    assert_frame_equal(found, want, rel_tol=1e-5, abs_tol=1e-9)


@pytest.mark.parametrize("case", ["ddp", "ddp_given_whole", "fsdp", "hsdp"])
def test_ranks_record_what_one_process_does(recorded: Path, case: str) -> None:
    want = alone([0, 1])
    for rank in range(worker.WORLD):
        stats, errors = frames(recorded, case, rank)
        assert_same(stats, want.frame())
        assert_same(errors, want.errors_frame())
    inputs = want.frame().filter(operand="input")
    assert inputs["tokens"].unique().to_list() == [2 * (2 * 9 + 3 * 8)]
    # Rank 0 has 4 sequences a step, rank 1 has 6: theirs are numbered from 4.
    sequences = {token["sequence"] for tokens in inputs["top_tokens"] for token in tokens}
    assert sequences <= set(range(10))
    assert max(sequences) >= 4


def test_ranks_can_be_kept_apart(recorded: Path) -> None:
    for rank in range(worker.WORLD):
        stats, errors = frames(recorded, "apart", rank)
        want = alone([rank])
        assert stats.equals(want.frame())
        assert errors.equals(want.errors_frame())


def test_a_linear_that_one_rank_alone_calls(recorded: Path) -> None:
    model = worker.make_model()
    with Recorder(model) as want:
        model(input_ids=worker.batches(0)[0])
        want.step()
    head = pl.col("site") == "lm_head:input"
    for rank in range(worker.WORLD):
        stats, _ = frames(recorded, "uneven", rank)
        assert_same(stats.filter(head), want.frame().filter(head))
        rest = stats.filter(~head, operand="input")
        assert rest["tokens"].unique().to_list() == [2 * 18]


def test_ranks_with_different_linears_are_refused(recorded: Path) -> None:
    for rank in range(worker.WORLD):
        message = (recorded / "different" / f"error-{rank}").read_text()
        assert "merge_ranks=False" in message
