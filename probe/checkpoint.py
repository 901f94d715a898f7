"""Checkpoints: a directory, a hub name or a GGUF file to a float32 model and its tokenizer.

Everything that could go wrong later is looked for here, before it costs time: safetensors headers
are held against the length of their files, every parameter must come from the checkpoint
(transformers fills gaps with random numbers and goes on), and no weight may be NaN or infinite.
Pickled weights are never opened, and code of the checkpoint runs only when asked.

A causal architecture is loaded with its head, so that it has a loss; an encoder without one.
Experts that transformers keeps as one 3-D parameter come out as one linear each (experts.py).
"""

import contextlib
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitplan.errors import BitplanError, CheckpointError, PlanError
from bitplan.probe.blocks import PartedModel
from bitplan.probe.experts import unfuse_experts
from bitplan.probe.loading import (
    gguf_note,
    gguf_read_once,
    is_causal,
    quiet,
    read_config,
    read_model,
    read_tokenizer,
)
from bitplan.probe.loading import some as some
from bitplan.rundir import file_hash

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_HUB_SKIPPED = ("consolidated*", "original/*", "onnx/*", "*/*")
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded model in float32 and eval mode, its tokenizer, and what identifies them.

    `family` is the language model's `model_type`; `weights_note` says what happened to the weights
    before they got here (GGUF rounding), or is None.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    content_hash: str
    family: str
    weights_note: str | None

    def facts(self) -> dict[str, Any]:
        """Return the entries of the manifest's key `model`."""
        parameters = list(self.model.parameters())
        return {
            "source": self.source,
            "content_hash": self.content_hash,
            "family": self.family,
            "architecture": type(self.model).__name__,
            "num_parameters": sum(p.numel() for p in parameters),
            "num_non_embedding_parameters": num_non_embedding_parameters(self.model),
            "weights_note": self.weights_note,
        }

    @property
    def has_loss(self) -> bool:
        """Whether the model predicts the next token, so that a change of loss can be told."""
        return is_causal(self.model.config)


def num_non_embedding_parameters(model: Any) -> int:
    """Return the parameters of a model without those of embeddings and of the output head."""
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    modules += [head] if (head := model.get_output_embeddings()) is not None else []
    embeddings = {id(p) for module in modules for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)


def check_vocabulary(model: Any, ids: Tensor, source: str) -> None:
    """Raise CheckpointError where a model has no embedding for a token that its tokenizer wrote."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if (largest := int(ids.max())) >= vocabulary:
        raise CheckpointError(
            f"{source}: its tokenizer writes token {largest}, its embedding has {vocabulary}: they "
            "do not belong together; give the tokenizer that the model was trained with"
        )


def resolve_device(name: str) -> torch.device:
    """Return the device that `name` means; `auto` is cuda where there is one, else cpu.

    Raises BitplanError for a name torch does not know and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BitplanError(f"no device {name!r}: write cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BitplanError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()}")
    return device


def load_checkpoint(
    source: str, *, device: str = "auto", trust_remote_code: bool = False
) -> Checkpoint:
    """Load a Hugging Face directory or hub name (safetensors) or a GGUF file.

    Raises CheckpointError where it is missing, damaged, unsupported, incomplete or not finite.
    """
    target = resolve_device(device)
    directory, gguf, files = _find(source, trust_remote_code)
    where = {"gguf_file": gguf} if gguf else {}
    options = {**where, "trust_remote_code": trust_remote_code}
    once = gguf_read_once() if gguf else contextlib.nullcontext()
    with once, quiet(), torch.random.fork_rng(devices=[]):
        weights_note = gguf_note(directory / gguf) if gguf else None
        config = read_config(directory, source, options)
        tokenizer = read_tokenizer(directory, source, options)
        model = read_model(directory, source, config, options)
    unfuse_experts(model)
    _check_finite(model, source)
    return Checkpoint(
        model=model.to(target).eval(),
        tokenizer=tokenizer,
        source=source,
        content_hash=hash_files(files),
        family=str(config.get_text_config().model_type),
        weights_note=weights_note,
    )


def load_profiled(
    facts: Mapping[str, Any], *, device: str = "auto", trust_remote_code: bool = False
) -> Checkpoint:
    """Load the checkpoint that a manifest's `model` tells of, again.

    Raises PlanError where it is another by now, and CheckpointError as `load_checkpoint` does.
    """
    source = facts["source"]
    checkpoint = load_checkpoint(source, device=device, trust_remote_code=trust_remote_code)
    if checkpoint.content_hash != facts["content_hash"]:
        raise PlanError(
            f"{source} has changed since it was profiled: then {facts['content_hash'][:8]}, now "
            f"{checkpoint.content_hash[:8]}; profile it into a new directory and plan again"
        )
    return checkpoint


def open_in_parts(
    source: str,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    content_hash: str | None = None,
) -> tuple[Checkpoint, PartedModel]:
    """Open a Hugging Face directory or hub name without its weights, to be read part by part.

    content_hash: what `identify` said, if it was asked, so that the files are not read for it.
    The checkpoint's model is that of the parts: it has values only where a part is mounted. Raises
    CheckpointError as `load_checkpoint` does, for GGUF, and for what does not run block by block.
    """
    target = resolve_device(device)
    directory, gguf, files = _find(source, trust_remote_code)
    if gguf:
        raise CheckpointError(
            f"{source} is GGUF, which is read whole: profile it without --stream, or give the "
            "safetensors that it was made from"
        )
    options = {"trust_remote_code": trust_remote_code}
    with quiet():
        config = read_config(directory, source, options)
        tokenizer = read_tokenizer(directory, source, options)

    def read(devices: Mapping[str, str]) -> Any:
        with quiet(), torch.random.fork_rng(devices=[]):
            return read_model(directory, source, config, options, devices)

    parted = PartedModel(read, source, target)
    checkpoint = Checkpoint(
        model=parted.model,
        tokenizer=tokenizer,
        source=source,
        content_hash=content_hash or hash_files(files),
        family=str(config.get_text_config().model_type),
        weights_note=None,
    )
    return checkpoint, parted


def float32_bytes(source: str, *, trust_remote_code: bool = False) -> int | None:
    """Return the size of a checkpoint's weights in float32, None for GGUF, which is read whole."""
    _, gguf, files = _find(source, trust_remote_code)
    if gguf:
        return None
    headers = [read_header(path) for path in files if path.suffix == ".safetensors"]
    elements = sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
    return 4 * int(elements)


# --- finding and checking the files ------------------------------------------------------------


def identify(source: str, *, trust_remote_code: bool = False) -> str:
    """Return the content hash of a checkpoint without loading it.

    Raises CheckpointError as `load_checkpoint` does for files that are missing or damaged.
    """
    return hash_files(_find(source, trust_remote_code)[2])


def _find(source: str, trust_remote_code: bool) -> tuple[Path, str | None, list[Path]]:
    """Return the directory, the GGUF file's name in it if it is one, and all files that count."""
    directory, gguf = _locate(source, trust_remote_code)
    return directory, gguf, [directory / gguf] if gguf else _checked_files(directory)


def _locate(source: str, trust_remote_code: bool) -> tuple[Path, str | None]:
    """Return the checkpoint's directory and, for GGUF, the name of its file in it."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path.parent, path.name
        raise CheckpointError(
            f"{source} is a file and no GGUF: give the directory it is in, "
            "or profile safetensors alone with --weights-only"
        )
    if path.is_dir():
        ggufs = sorted(entry.name for entry in path.glob("*.gguf"))
        if ggufs and not (path / "config.json").is_file():
            if len(ggufs) > 1:
                raise CheckpointError(
                    f"{source} holds {len(ggufs)} GGUF files: name one of {', '.join(ggufs)}"
                )
            return path, ggufs[0]
        return path, None
    if not _HUB_NAME.fullmatch(source):
        raise CheckpointError(f"no checkpoint at {source}: there is no such file or directory")
    return _download(source, trust_remote_code), None


def _download(name: str, trust_remote_code: bool) -> Path:
    """Return the local snapshot of a hub repository; pickles are never fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    code = ("*.py",) if trust_remote_code else ()
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=[*_HUB_FILES, *code], ignore_patterns=list(_HUB_SKIPPED)
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}): check the name, the network and your access"
        ) from error


def _checked_files(directory: Path) -> list[Path]:
    """Return the files that make up a checkpoint, after checking that they are whole."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json: give a Hugging Face checkpoint directory"
        )
    weights = weight_files(directory)
    for path in weights:
        read_header(path)
    rest = (
        p for p in directory.iterdir() if p.is_file() and p.suffix.lower() in _TOKENIZER_SUFFIXES
    )
    return sorted({*weights, *rest})


def weight_files(directory: Path) -> list[Path]:
    """Return a checkpoint directory's safetensors files, sorted: one, or the shards of its index.

    Raises CheckpointError where there are none, where the index is damaged, or where a shard that
    it names is missing.
    """
    index = directory / _INDEX
    if index.is_file():
        try:
            shards = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: no weight_map can be read") from error
        if missing := [name for name in shards if not (directory / name).is_file()]:
            raise CheckpointError(
                f"{directory} lacks {some(missing)}, which {_INDEX} names: fetch the shards again"
            )
        return [directory / name for name in shards]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix.lower() in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} holds its weights as pickle only ({some(pickles)}), which bitplan never "
            "opens: convert them to safetensors"
        )
    raise CheckpointError(f"{directory} has no model.safetensors and no {_INDEX}")


def read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header: tensor name to dtype, shape and data_offsets.

    Raises CheckpointError where the file is no safetensors or shorter or longer than it says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size + 1
        if length > size - 8:
            raise CheckpointError(f"{path} is truncated or no safetensors: {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} is no safetensors: its header is damaged") from error
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path} is truncated or damaged: its header tells of {8 + length + end} bytes, "
            f"the file has {size}"
        )
    assert isinstance(header, dict)
    return header


def hash_files(files: Iterable[Path]) -> str:
    """Return 32 hex digits over the files' names and bytes, sorted by name."""
    digest, ordered = hashlib.sha256(), sorted(files)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for path, inner in zip(ordered, pool.map(file_hash, ordered), strict=True):
            digest.update(f"{path.name}\0{inner}\n".encode())
    return digest.hexdigest()[:32]


def _check_finite(model: nn.Module, source: str) -> None:
    for name, parameter in model.named_parameters():
        if bad := int((~torch.isfinite(parameter)).sum()):
            raise CheckpointError(
                f"{source}: {name} has {bad} of {parameter.numel()} weights NaN or infinite: "
                "the checkpoint is damaged or its training diverged"
            )
