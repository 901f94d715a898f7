"""The ranks of a distributed training, whose statistics are joined as if one process had seen all.

Inputs. Every rank has seen other tokens; states are joined in the order of ranks, as TensorStats
joins chunks: sequences are numbered on, the top tokens are those of all ranks.

Weights. A weight that all ranks hold whole (DDP) is read by one of them, by turns. Of a DTensor
sharded by rows (FSDP2) each rank reads its rows. Where rows alone do not tell the result (columns
sharded, a scale of the whole tensor, gate and up in one matrix) that one tensor is gathered.

A recorded step takes four collective calls, whatever the number of sites: three sums or maxima and
one gathering of moments and tokens. Nothing else communicates, so `frame` may be called on one rank
alone; but every rank must enter the Recorder and mark the same steps.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitplan.errors import CheckpointError
from bitplan.probe.batch import Batch
from bitplan.probe.moments import pool
from bitplan.probe.tensor_stats import _ABSMAX, _FIRST, _SEQUENCE


class Ranks:
    """The ranks of torch.distributed's default group, this one among them."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @classmethod
    def of_this_process(cls) -> "Ranks | None":
        """Return the ranks of this training, None if it is not distributed."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        return cls()

    def agree_on(self, sites: Sequence[str]) -> None:
        """Raise CheckpointError unless all ranks record the same sites."""
        every: list[Sequence[str]] = [[]] * self.size
        dist.all_gather_object(every, list(sites))
        for rank, others in enumerate(every):
            if list(others) != list(sites):
                raise CheckpointError(
                    f"rank {self.rank} holds {len(sites)} sites and rank {rank} {len(others)}, not "
                    "the same: with the model split over ranks give merge_ranks=False"
                )

    @staticmethod
    def shard(model: nn.Module) -> None:
        """Let FSDP2 give back the weights that it still holds whole since a forward pass.

        The optimizer has updated their shards only.
        """
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def join(self, batch: Batch) -> Batch:
        """Return a batch as all ranks have seen it; every rank must call this."""
        sites, inputs = len(batch.widths), len(batch.top)
        summed = [batch.squares, batch.counts, batch.nonfinite, batch.errors, batch.extras]
        sums = [part.flatten() for part in summed]
        packed = torch.cat(sums)
        dist.all_reduce(packed)
        dist.all_reduce(batch.histogram)
        largest = torch.cat([batch.absmax, batch.maxima.flatten()])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        absmax, maxima = torch.split(largest, _sizes([batch.absmax, batch.maxima]))
        squares, counts, nonfinite, errors, extras = (
            part.view_as(like)
            for part, like in zip(torch.split(packed, _sizes(sums)), summed, strict=True)
        )

        own = [batch.pooled, batch.top, batch.numbers]
        mine = torch.cat([part.flatten() for part in own])
        gathered = mine.new_empty(self.size, mine.numel())
        dist.all_gather(list(gathered.unbind()), mine)
        parts = torch.split(gathered, _sizes(own), dim=1)
        pooled, top, numbers = (
            part.reshape(self.size, *like.shape) for part, like in zip(parts, own, strict=True)
        )
        top, below = _top_of_all(top, numbers[:, :inputs])
        below = torch.cat([below, below.new_zeros(sites - inputs, *below.shape[1:])])
        return replace(
            batch,
            pooled=pool(torch.cat([pooled.movedim(0, 2), below[:, :, None]], dim=2)),
            top=top,
            absmax=absmax,
            squares=squares,
            counts=counts,
            nonfinite=nonfinite,
            errors=errors,
            extras=extras,
            maxima=maxima.view_as(batch.maxima),
            numbers=torch.cat([numbers.sum(0)[:, :2], numbers.amax(0)[:, 2:]], dim=1),
        )

    def share(self, weight: Tensor, turn: int, whole: bool) -> tuple[Tensor, bool]:
        """Return the rows of a weight that are here, and whether this rank is to read them.

        turn: counts the weights, so that each rank has its turn. whole: rows alone do not do.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mine = turn % self.size == self.rank
        if not isinstance(weight, DTensor):
            return weight, mine
        if whole or not all(
            type(place) is Replicate or (type(place) is Shard and place.dim == 0)
            for place in weight.placements
        ):
            return weight.full_tensor(), mine
        coordinate = weight.device_mesh.get_coordinate()
        assert coordinate is not None
        copy = any(
            type(place) is Replicate and i > 0
            for place, i in zip(weight.placements, coordinate, strict=True)
        )
        return weight.to_local(), not copy


def whole_tensor(weight: Tensor) -> Tensor:
    """Return a weight as one tensor, gathered from all ranks where it is sharded."""
    full = getattr(weight, "full_tensor", None)
    return weight if full is None else full()


def _sizes(parts: Sequence[Tensor]) -> list[int]:
    return [part.numel() for part in parts]


def _top_of_all(top: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top tokens of all ranks [inputs, tokens, ...], and the others' moments.

    top: [ranks, inputs, tokens, ...]. The moments are of the others and the first ones, as in
    TensorStats: [inputs, 2, 5].
    """
    kept = top.shape[2]
    top = top.clone()
    before = numbers[..., 1].cumsum(0) - numbers[..., 1]
    sequence = top[..., _SEQUENCE]
    top[..., _SEQUENCE] = torch.where(sequence >= 0, sequence + before[..., None], sequence)
    filled = torch.arange(kept, device=top.device) < numbers[..., :1]
    key = torch.where(filled, top[..., _ABSMAX], -1.0)
    flat = top.movedim(0, 1).flatten(1, 2)
    order = key.movedim(0, 1).flatten(1).sort(descending=True, stable=True).indices
    flat = flat.gather(1, order[..., None].expand_as(flat))
    top, rest = flat[:, :kept], flat[:, kept:, :5]
    first = flat[:, kept:, _FIRST, None]
    return top, pool(torch.stack([rest * (1 - first), rest * first], dim=1))
