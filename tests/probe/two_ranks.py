"""What one of two processes does in test_ranks.py: two_ranks.py RANK DIRECTORY DEVICE.

Every case writes DIRECTORY/CASE/stats-RANK.parquet and errors-RANK.parquet.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
device = torch.device("cpu")


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
    return LlamaForCausalLM(config).train().to(device)


def batches(rank: int) -> list[Tensor]:
    """Two micro-batches a step; ranks differ in length, so that sequences and tokens do too."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2 + rank, 9 - rank)
    return [torch.randint(97, shape, generator=generator).to(device) for _ in range(2 * STEPS)]


def record(model: nn.Module, plain: nn.Module, ranks: list[int], **options: Any) -> Recorder:
    """Run two steps that take the ranks' micro-batches in order; the update is the same for all."""
    with Recorder(plain, formats=FORMATS, drift=True, **options) as recorder:
        for step in range(STEPS):
            for rank in ranks:
                for ids in batches(rank)[2 * step : 2 * step + 2]:
                    model(input_ids=ids, labels=ids).loss.backward()
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.mul_(1.25)
            recorder.step()
    return recorder


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
    mesh = init_device_mesh(device.type, (2, 1), mesh_dim_names=("replicate", "shard"))
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
    try:
        Recorder(model).__enter__()
    except CheckpointError as error:
        (directory / f"error-{rank}").write_text(str(error))


CASES = (ddp, ddp_given_whole, fsdp, hsdp, apart, uneven, different)


def main(rank: int, directory: Path, kind: str) -> None:
    global device
    torch.set_num_threads(1)
    if kind == "cuda":
        device = torch.device(kind, rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=WORLD,
    )
    for case in CASES:
        place = directory / case.__name__
        place.mkdir(exist_ok=True)
        case(rank, place)
        gc.collect()  # models hold process groups, which must not outlive the default one
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
