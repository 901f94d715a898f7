"""Two processes over gloo record what one process that sees both of their batches does."""

import copy
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from polars.testing import assert_frame_equal
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.errors import CheckpointError
from bitplan.probe import Recorder

FORMATS = ("int4-g32", "int8-token", "int4-channel")
WORLD = 2
STEPS = 2


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,  # rows that two ranks cannot share evenly
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).train()


def batches(rank: int) -> list[Tensor]:
    """Two micro-batches a step; ranks differ in length, so that sequences and tokens do too."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2 + rank, 9 - rank)
    return [torch.randint(97, shape, generator=generator) for _ in range(2 * STEPS)]


def record(model: nn.Module, plain: nn.Module, ranks: list[int], **options: Any) -> Recorder:
    """Run two steps without an update in between; each takes the ranks' micro-batches in order."""
    with Recorder(plain, formats=FORMATS, drift=True, **options) as recorder:
        for step in range(STEPS):
            for rank in ranks:
                for ids in batches(rank)[2 * step : 2 * step + 2]:
                    model(input_ids=ids)
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.mul_(1.25)
            recorder.step()
    return recorder


def start(rank: int, directory: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD
    )
    try:
        CASES[name](rank, Path(directory))
    finally:
        dist.destroy_process_group()


def spawn(name: str, directory: Path) -> list[tuple[pl.DataFrame, pl.DataFrame]]:
    mp.start_processes(start, (str(directory), name), nprocs=WORLD, start_method="fork")
    return [
        (
            pl.read_parquet(directory / f"stats-{rank}.parquet"),
            pl.read_parquet(directory / f"errors-{rank}.parquet"),
        )
        for rank in range(WORLD)
    ]


def write(recorder: Recorder, rank: int, directory: Path) -> None:
    recorder.frame().write_parquet(directory / f"stats-{rank}.parquet")
    recorder.errors_frame().write_parquet(directory / f"errors-{rank}.parquet")


def ddp(rank: int, directory: Path) -> None:
    plain = make_model()
    write(record(DistributedDataParallel(plain), plain, [rank]), rank, directory)


def ddp_given_whole(rank: int, directory: Path) -> None:
    wrapped = DistributedDataParallel(make_model())
    write(record(wrapped, wrapped, [rank]), rank, directory)


def fsdp(rank: int, directory: Path) -> None:
    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    write(record(model, model, [rank]), rank, directory)


def hsdp(rank: int, directory: Path) -> None:
    """Replicas instead of shards: each weight is held by both ranks, as a DTensor."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = make_model()
    fully_shard(model, mesh=mesh)
    write(record(model, model, [rank]), rank, directory)


def apart(rank: int, directory: Path) -> None:
    plain = make_model()
    write(record(plain, plain, [rank], merge_ranks=False), rank, directory)


def uneven(rank: int, directory: Path) -> None:
    """Rank 1 never calls the head."""
    plain = make_model()
    with Recorder(plain) as recorder:
        (plain if rank == 0 else plain.model)(input_ids=batches(0)[0])
        recorder.step()
    write(recorder, rank, directory)


def different(rank: int, directory: Path) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(1 + rank)])
    with pytest.raises(CheckpointError, match="merge_ranks=False"), Recorder(model):
        pass


CASES = {
    case.__name__: case for case in (ddp, ddp_given_whole, fsdp, hsdp, apart, uneven, different)
}


def alone(ranks: list[int]) -> Recorder:
    model = make_model()
    return record(model, model, ranks)


def assert_same(found: pl.DataFrame, want: pl.DataFrame) -> None:
    assert_frame_equal(found, want, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("name", ["ddp", "ddp_given_whole", "fsdp", "hsdp"])
def test_ranks_record_what_one_process_does(name: str, tmp_path: Path) -> None:
    want = alone([0, 1])
    for stats, errors in spawn(name, tmp_path):
        assert_same(stats, want.frame())
        assert_same(errors, want.errors_frame())
    inputs = want.frame().filter(operand="input")
    assert inputs["tokens"].unique().to_list() == [2 * (2 * 9 + 3 * 8)]
    sequences = {t["sequence"] for tokens in inputs["top_tokens"] for t in tokens}
    assert {0, 9} <= sequences


def test_ranks_can_be_kept_apart(tmp_path: Path) -> None:
    for rank, (stats, errors) in enumerate(spawn("apart", tmp_path)):
        want = alone([rank])
        assert stats.equals(want.frame())
        assert errors.equals(want.errors_frame())


def test_a_linear_that_one_rank_alone_calls(tmp_path: Path) -> None:
    model = make_model()
    with Recorder(model) as want:
        model(input_ids=batches(0)[0])
        want.step()
    for stats, _ in spawn("uneven", tmp_path):
        head = pl.col("site") == "lm_head:input"
        assert_same(stats.filter(head), want.frame().filter(head))
        twice = stats.filter(~head, operand="input")
        assert twice["tokens"].unique().to_list() == [2 * 18]


def test_ranks_with_different_linears_are_refused(tmp_path: Path) -> None:
    mp.start_processes(start, (str(tmp_path), "different"), nprocs=WORLD, start_method="fork")
