"""The weights of any safetensors checkpoint, one tensor in memory at a time, without model code.

A source is one safetensors file, an index, or a directory (its index's shards, or all safetensors
files in it). Headers are held against file lengths before anything is read; tensors are mapped,
not loaded, and converted to float32 in blocks. What counts as a linear:

    2-D floating point       one linear; embeddings by name, GPT-2's Conv1D matrices transposed
    3-D `...experts.NAME`    one linear per expert, `...experts.0.NAME`
    all else                 skipped and listed: norms, biases, convolutions, packed integers

fp8 matrices with a scale beside them (`NAME_scale_inv` or `NAME_scale`: one value, one per output
channel, or one per 128 x 128 block as DeepSeek-V3 stores them) are multiplied by it. Roles are
those of core/sites.py, with the `model_type` of a config.json beside the files. NaN and infinite
weights are counted in the statistics: a file may be probed because it has them.
"""

import json
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from bitplan.errors import CheckpointError
from bitplan.families import INTERLEAVED, TRANSPOSED
from bitplan.formats import Format
from bitplan.probe.checkpoint import read_header, weight_files
from bitplan.probe.tensor_stats import TensorStats
from bitplan.sites import Linear, describe, site_columns

T = TypeVar("T")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
_SCALE_BLOCK = 128
_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")
_EMBEDDING = re.compile(r"(^|\.)(wpe|wte|[^.]*embed[^.]*)$")
_EXPERTS = re.compile(r"(^|\.)experts\.[^.]+$")
_BLOCK = 1 << 17  # elements converted to float32 at a time; two blocks stay in a core's cache
_GPU_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear and where its weight lies: a tensor of a file, one expert of it, or transposed."""

    linear: Linear
    path: Path
    tensor: str
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """What a source holds, read from the headers alone.

    `skipped` are the names of the tensors that are no linears; `family` is the `model_type` of the
    config beside the files, or None; `num_parameters` counts the elements of all tensors.
    """

    source: str
    files: tuple[Path, ...]
    family: str | None
    architecture: str | None
    matrices: tuple[Matrix, ...]
    skipped: tuple[str, ...]
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class WeightRecord:
    """The statistics of one weight: a row of tables.PROFILE, and its rows of tables.ERRORS."""

    linear: Linear
    row: dict[str, Any]
    errors: list[dict[str, Any]]


def profile_weights(
    source: str | WeightFiles,
    formats: Sequence[Format] = (),
    device: torch.device | str = "cpu",
) -> Iterator[WeightRecord]:
    """Yield the statistics of each linear's weight at step 0, in the order of the files.

    On a CPU as many matrices are in work as torch has threads, each by one thread: memory is
    bounded by the largest tensor times that. Raises CheckpointError as `open_weights` does.
    """
    files = open_weights(source) if isinstance(source, str) else source
    target = torch.device(device)
    matrices = {matrix.linear.module: matrix for matrix in files.matrices}
    partners = gate_up_partners([matrix.linear for matrix in files.matrices], files.family)
    local = threading.local()

    def measure(matrix: Matrix) -> tuple[WeightRecord, dict[str, Tensor] | None]:
        """Return a matrix's record, and its alignment if it comes first of its pair."""
        if not hasattr(local, "read"):
            local.read = _Reader().read
        name, weight = matrix.linear.module, local.read(matrix).to(target)
        seen = TensorStats(weight.shape[1], operand="weight", formats=formats, device=weight.device)
        seen.update(weight)
        summary = seen.summary()
        row = site_columns(matrix.linear, "weight") | {"step": 0} | summary.row()
        site = {"site": row["site"], "step": 0}
        errors = [site | error for error in summary.error_rows()]
        alignment = None
        if (partner := partners.get(name)) is not None and order[name] <= order[partner]:
            other = None if partner == name else local.read(matrices[partner]).to(target)
            alignment = gate_up_alignment(weight, other)
        return WeightRecord(linear=matrix.linear, row=row, errors=errors), alignment

    order = {name: index for index, name in enumerate(matrices)}
    alignments: dict[str, dict[str, float]] = {}
    workers = torch.get_num_threads() if target.type == "cpu" else 1
    for record, alignment in _in_order(measure, files.matrices, workers):
        name = record.linear.module
        if alignment is not None:
            values = {column: float(value) for column, value in alignment.items()}
            alignments[name] = alignments[partners[name]] = values
        record.row.update(alignments.get(name, {}))
        yield record


def _in_order(
    function: Callable[[Matrix], T], matrices: Sequence[Matrix], workers: int
) -> Iterator[T]:
    """Yield what the function makes of each matrix, in order, by so many threads.

    Each has one thread of torch: matrices side by side leave cores less idle than one operation
    after the other, shared out.
    """
    if workers < 2:
        yield from map(function, matrices)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started: deque[Future[T]] = deque()
        try:
            for matrix in matrices:
                started.append(pool.submit(function, matrix))
                if len(started) > 2 * workers:
                    yield started.popleft().result()
            while started:
                yield started.popleft().result()
        finally:
            for future in started:
                future.cancel()
            torch.set_num_threads(workers)


def open_weights(source: str) -> WeightFiles:
    """Find a source's safetensors files and list what they hold.

    Raises CheckpointError where there is nothing of the kind, only pickles, a file that is
    truncated or no safetensors, a missing shard, or no matrix at all.
    """
    path = Path(source).expanduser()
    files = _files(path, source)
    headers = {file: read_header(file) for file in files}
    config = _config(path if path.is_dir() else path.parent)
    text = config.get("text_config") or config
    entries = {name: (file, entry) for file in files for name, entry in headers[file].items()}
    family = text.get("model_type") or _family_by_names(entries)
    matrices, skipped = [], []
    for name, (file, entry) in entries.items():
        found = _matrices(name, file, entry, family)
        matrices += found
        if not found:
            skipped.append(name)
    if not matrices:
        raise CheckpointError(f"{source} holds no matrix of floating point numbers to profile")
    linears = describe(
        [matrix.linear for matrix in matrices],
        family=family,
        hidden_size=text.get("hidden_size"),
    )
    return WeightFiles(
        source=source,
        files=tuple(files),
        family=family,
        architecture=next(iter(config.get("architectures") or ()), None),
        matrices=tuple(
            replace(matrix, linear=_embedding(linear))
            for matrix, linear in zip(matrices, linears, strict=True)
        ),
        skipped=tuple(skipped),
        num_parameters=sum(math.prod(entry["shape"]) for _, entry in entries.values()),
    )


def gate_up_partners(linears: Sequence[Linear], family: str | None = None) -> dict[str, str]:
    """Return for each gate or up linear the name of the other; its own where it holds both.

    Both are the two fc1 linears of one fused group with one shape, or one `gate_up_proj`, whose
    first half of rows is the gate (families that interleave the two are left out).
    """
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        if linear.role == "fc1" and linear.fused is not None:
            groups.setdefault(linear.fused, []).append(linear)
    partners: dict[str, str] = {}
    for group in groups.values():
        match group:
            case [one] if one.module.endswith("gate_up_proj") and family not in INTERLEAVED:
                partners[one.module] = one.module
            case [a, b] if a.out_features == b.out_features:
                partners |= {a.module: b.module, b.module: a.module}
    return partners


def gate_up_alignment(weight: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
    """Return mean and largest |cosine| of matching rows of gate and up weights, on the device.

    weight, other: [out_features, in_features]; without `other`, the two halves of `weight`. The
    keys are columns of tables.PROFILE. Rows that align make the product of gate and up a square,
    and its outliers with it (arXiv 2409.12517): the largest tells it first.
    """
    gate, up = weight.chunk(2) if other is None else (weight, other)
    block = _BLOCK if gate.device.type == "cpu" else _GPU_BLOCK
    size = max(1, block // gate.shape[1])
    pairs = zip(torch.split(gate, size), torch.split(up, size), strict=True)
    cosines = torch.cat([row_cosines(g, u) for g, u in pairs])
    return {"gate_up_correlation": cosines.mean(), "gate_up_correlation_max": cosines.max()}


def row_cosines(gate: Tensor, up: Tensor) -> Tensor:
    """Return |cosine| of matching rows [..., in_features] of gate and up, 0 beside a zero row."""
    a, b = gate.float(), up.float()
    lengths = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    # Not vecdot, which autocast takes for a product that may be rounded.
    cosines: Tensor = (a * b).sum(-1) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return cosines.abs()


class _Reader:
    """Reads matrices; a file is mapped only while a tensor of it is in use."""

    def __init__(self) -> None:
        self._latest: tuple[Path, str, Tensor] | None = None

    def read(self, matrix: Matrix) -> Tensor:
        """Return a weight as [out_features, in_features], of the latest tensor without reading."""
        if self._latest is None or self._latest[:2] != (matrix.path, matrix.tensor):
            self._latest = None  # unmapped before the next one is mapped
            self._latest = (matrix.path, matrix.tensor, _tensor(matrix.path, matrix.tensor))
        weight = self._latest[2]
        if matrix.expert is not None:
            weight = weight[matrix.expert]
        return weight.T if matrix.transposed else weight


def _tensor(path: Path, name: str) -> Tensor:
    """Return a tensor mapped from its file, or times its scales where it has some."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        names = set(file.keys())
        for suffix in _SCALES:
            if name + suffix in names:
                return _scaled(tensor, file.get_tensor(name + suffix), name)
    return tensor


def _scaled(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """Return a matrix times its scales: one, one per row, or one per block, as float32."""
    rows, columns = weight.shape[-2:]
    scale = scale.float()
    if scale.numel() == 1:
        return weight.float() * scale.reshape(())
    if scale.numel() == rows:
        return weight.float() * scale.reshape(rows, 1)
    if scale.shape == (-(-rows // _SCALE_BLOCK), -(-columns // _SCALE_BLOCK)):
        wide = scale.repeat_interleave(_SCALE_BLOCK, 0).repeat_interleave(_SCALE_BLOCK, 1)
        return weight.float() * wide[:rows, :columns]
    raise CheckpointError(
        f"{name} of shape {tuple(weight.shape)} has scales of shape {tuple(scale.shape)}: bitplan "
        "reads one scale, one per output channel, or one per 128 x 128 block"
    )


def _files(path: Path, source: str) -> list[Path]:
    """Return the safetensors files of a source, sorted by name."""
    if path.name.endswith(_INDEX_SUFFIX) and path.is_file():
        return weight_files(path)
    if path.is_file():
        if path.suffix.lower() == ".safetensors":
            return [path]
        raise CheckpointError(
            f"{source} is no safetensors file: weights alone are read from safetensors only, "
            "pickles are never opened"
        )
    if not path.is_dir():
        raise CheckpointError(f"no weights at {source}: there is no such file or directory")
    shards = sorted(path.glob("*.safetensors"))
    indexed = any(path.glob("*" + _INDEX_SUFFIX))
    if not shards or indexed or (path / "model.safetensors").is_file():
        return weight_files(path)
    totals = {int(match[1]) for shard in shards if (match := _SHARD.search(shard.name))}
    if totals and len(shards) != max(totals):
        raise CheckpointError(
            f"{source} has {len(shards)} safetensors files, their names tell of {max(totals)}: "
            "fetch the missing shards"
        )
    return shards


def _config(directory: Path) -> dict[str, Any]:
    """Return the config.json beside the files, empty where there is none."""
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _matrices(name: str, path: Path, entry: dict[str, Any], family: str | None) -> list[Matrix]:
    """Return the linears that a tensor holds, roles still to be told; none for all else."""
    shape, module = entry["shape"], name.removesuffix(".weight")
    if entry["dtype"] not in _FLOATS or 0 in shape or re.search(r"[._]bias$|_scale(_inv)?$", name):
        return []
    if len(shape) == 2:
        return [_matrix(module, shape, family, path=path, tensor=name)]
    if len(shape) == 3 and _EXPERTS.search(module):
        parent, _, leaf = module.rpartition(".")
        return [
            _matrix(f"{parent}.{i}.{leaf}", shape[1:], family, path=path, tensor=name, expert=i)
            for i in range(shape[0])
        ]
    return []


def _matrix(
    module: str,
    shape: Sequence[int],
    family: str | None,
    *,
    path: Path,
    tensor: str,
    expert: int | None = None,
) -> Matrix:
    pattern = TRANSPOSED.get(family or "")
    transposed = pattern is not None and re.search(rf"(?:^|\.)(?:{pattern})$", module) is not None
    rows, columns = reversed(shape) if transposed else shape
    linear = Linear(module, in_features=int(columns), out_features=int(rows))
    return Matrix(linear=linear, path=path, tensor=tensor, expert=expert, transposed=transposed)


def _embedding(linear: Linear) -> Linear:
    """Return the linear as an embedding where its name says that it is one."""
    named = linear.block is None and _EMBEDDING.search(linear.module)
    return replace(linear, role="embed", fused=None) if named else linear


def _family_by_names(entries: dict[str, tuple[Path, dict[str, Any]]]) -> str | None:
    """Tell GPT-2, whose matrices are transposed, by name and shape where no config does."""
    for name, (_, entry) in entries.items():
        if name.endswith("attn.c_attn.weight") and len(entry["shape"]) == 2:
            rows, columns = entry["shape"]
            return "gpt2" if columns == 3 * rows else None
    return None
