"""States of a training under way, from which it goes on after a kill.

    state-00000120/        after 120 steps; the last two are kept
        piece-0-of-1.pt    weights, optimizer, rows written so far

A state is written in a hidden folder, synced and renamed, so that it is whole or not there. Where
the parameters are sharded (FSDP2), every process writes the shards that it holds and where they lie
in the whole tensors, and any number of processes reads them. torch.distributed.checkpoint would do
that too, but it unpickles whatever its files hold, which may be code; these files are read as
tensors and plain values, and nothing else.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from bitplan.errors import RunError
from bitplan.rundir import sync_directory, write_atomic

_PREFIX = "state-"
_SHARD = "shard"


def find_states(directory: Path) -> list[Path]:
    """Return the states of an arm's directory, the last one first."""
    return sorted(directory.glob(f"{_PREFIX}*"), reverse=True)


def remove_states(directory: Path, *, keep: tuple[Path, ...] = ()) -> None:
    """Remove all states but those to keep, and what a killed process left half-written."""
    for path in (*find_states(directory), *directory.glob(f".{_PREFIX}*")):
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)


def write_state(
    directory: Path, step: int, state: Mapping[str, Any], *, processes: "Writers"
) -> Path:
    """Write a state, a piece for each of the processes that write; return its folder.

    state: tensors and plain values in dictionaries and lists; DTensors are written as their shards.
    Every process has to call this. Raises RunError where the disk is full or the place cannot be
    written; the states that are there stay.
    """
    path = directory / f"{_PREFIX}{step:08d}"
    staged = directory / f".{path.name}"
    if processes.index == 0:
        with _unwritable(staged):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
    processes.wait()
    piece = _with_shards(state)
    if processes.index < processes.count:
        name = f"piece-{processes.index}-of-{processes.count}.pt"
        try:
            write_atomic(staged / name, lambda file: _write(piece, file))
        except RunError:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    processes.wait()
    if processes.index == 0:
        with _unwritable(path):
            shutil.rmtree(path, ignore_errors=True)  # of the same step, from before
            os.replace(staged, path)
            sync_directory(directory)
    return path


@dataclass(frozen=True)
class Writers:
    """The processes that write a state: this one's index, and how many write."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, state: Mapping[str, Any], index: int) -> "Writers":
        """Return all processes where the state holds shards, the first one where it does not."""
        sharded = any(_is_sharded(leaf) for leaf in _leaves(state))
        return cls(index, dist.get_world_size() if sharded else 1)

    def wait(self) -> None:
        """Wait for the others, if there are any."""
        if self.count > 1:
            dist.barrier()


def read_state(path: Path) -> dict[str, Any]:
    """Read a state; its sharded tensors are `Shards`.

    Raises RunError where it is damaged or a piece is missing.
    """
    try:
        files = sorted(path.glob("piece-*.pt"))
        if not files or any(f"-of-{len(files)}.pt" not in file.name for file in files):
            raise RunError(f"{len(files)} of its pieces are there")
        # Of several pieces each process needs a part: they are mapped and not read whole.
        pieces = [
            torch.load(file, map_location="cpu", weights_only=True, mmap=len(files) > 1)
            for file in files
        ]
    except Exception as error:  # torch raises what its unpickler meets: any of many classes
        said = str(error).partition(". ")[0]  # torch goes on about how to open pickles anyway
        raise RunError(
            f"{path} cannot be read ({said}): delete it to start this arm anew"
        ) from error
    state: dict[str, Any] = _merged(pieces)
    return state


class Shards:
    """A tensor in parts: where each begins, and what it holds."""

    def __init__(self, shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], Tensor]]) -> None:
        self.shape = shape
        self.parts = parts

    def whole(self) -> Tensor:
        """Return the tensor, put together."""
        result = torch.empty(self.shape, dtype=self.parts[0][1].dtype)
        for offset, part in self.parts:
            place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
            result[place] = part
        return result


def placed(value: Any, like: Tensor) -> Any:
    """Return a value read from a state as the parameter that it belongs to is: whole or sharded.

    Values of another shape, such as the optimizer's count of steps, are returned as they are.
    """
    if isinstance(value, Shards):
        value = value.whole()
    if not _is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _is_sharded(value: object) -> bool:
    return hasattr(value, "device_mesh")


def _with_shards(value: Any) -> Any:
    """Return a state with every DTensor as a dictionary of this process's shard."""
    if isinstance(value, Mapping):
        return {key: _with_shards(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_with_shards(part) for part in value])
    if not _is_sharded(value):
        return value
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    # A clone: a shard may be a view of a buffer that is larger, and would be saved whole.
    local = value.to_local().detach().clone()
    return {_SHARD: local, "offset": list(offset), "shape": list(value.shape)}


def _merged(values: list[Any]) -> Any:
    """Return the pieces of a state as one; plain values are those of the first process."""
    first = values[0]
    if isinstance(first, dict) and _SHARD in first:
        parts = [(tuple(v["offset"]), v[_SHARD]) for v in values if v[_SHARD].numel()]
        return Shards(tuple(first["shape"]), parts)
    if isinstance(first, dict):
        return {key: _merged([value[key] for value in values]) for key in first}
    if isinstance(first, list) and not all(map(_is_plain, first)):
        return [_merged(list(parts)) for parts in zip(*values, strict=True)]
    return first


def _is_plain(value: object) -> bool:
    return not any(isinstance(leaf, Tensor) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _write(state: Any, file: IO[bytes]) -> None:
    """Write a state; a full disk stays the OSError it is, which torch hides in a RuntimeError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@contextlib.contextmanager
def _unwritable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error
