"""What bitplan asks of transformers: configs, tokenizers and models from local files, quietly.

Nothing here downloads. What transformers cannot load comes out as a CheckpointError of one line;
weights that it would replace by random numbers are an error as well.
"""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bitplan.errors import CheckpointError
from bitplan.progress import track

_NAMED = 3  # an error names this many things, then counts

# What transformers raises on files and configs it cannot use; anything else is a bug to see whole.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, ImportError)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_config(directory: Path, source: str, options: dict[str, Any]) -> Any:
    """Return a checkpoint's config; raise CheckpointError where nothing here can run it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, **options)
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{source}: transformers does not support this architecture or cannot read its "
            f"config: {_first_line(error)}"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{source}: {config.model_type} is an encoder-decoder; bitplan takes causal language "
            "models and encoders"
        )
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{source}: the weights are already quantized ({method or 'see its config'}): "
            "give the checkpoint they were made from"
        )
    return config


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CheckpointError(
            "reading GGUF needs the package gguf: pip install 'bitplan[gguf]'"
        ) from None


def read_tokenizer(directory: Path, source: str, options: dict[str, Any]) -> Any:
    """Return a checkpoint's tokenizer; raise CheckpointError where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, **options)
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{source} has no tokenizer that transformers can load: {_first_line(error)}"
        ) from error


def read_model(
    directory: Path,
    source: str,
    config: Any,
    options: dict[str, Any],
    devices: Mapping[str, str] | None = None,
) -> Any:
    """Return the model in float32; raise CheckpointError where any weight of it is missing.

    devices: where the modules of these names go, "" being all others; a part that goes to `meta`
    is not read.
    """
    # sdpa ignores the soft cap on attention logits that Gemma 2 was trained with.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    # Hooks that carry tensors between devices are for running such a model whole.
    undispatched = mock.patch("transformers.modeling_utils.accelerate_dispatch")
    try:
        with undispatched if devices else contextlib.nullcontext():
            model, info = _auto_class(config).from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **({"attn_implementation": "eager"} if capped else {}),
                **({"device_map": dict(devices)} if devices else {}),
                **options,
            )
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{source} cannot be loaded: {_first_line(error)}") from error
    if model.main_input_name != "input_ids":
        raise CheckpointError(
            f"{source}: {type(model).__name__} reads {model.main_input_name} and not tokens; "
            "bitplan takes causal language models and encoders of text"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}: {some(missing)}"
        )
    if info.get("mismatched_keys"):
        names = sorted(str(entry[0]) for entry in info["mismatched_keys"])
        raise CheckpointError(
            f"{source} has weights of another shape than its config: {some(names)}"
        )
    return model


def fresh_model(config: Any) -> Any:
    """Return a model of a config in float32, its weights drawn from torch's generator."""
    with quiet():
        return _auto_class(config).from_config(config, dtype=torch.float32)


def _auto_class(config: Any) -> Any:
    """Return the transformers class that loads this config with the head that was saved."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if is_causal(config):
        return transformers.AutoModelForCausalLM
    if _architecture(config) in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModel


def is_causal(config: Any) -> bool:
    """Return whether the model was saved with a head that predicts the next token."""
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # BERT and its like may be decoders too, when their config says so.
    is_encoder = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder and not getattr(config, "is_decoder", False):
        return False
    architecture = _architecture(config)
    remote = getattr(config, "auto_map", None) or {}
    if architecture is None:
        return config.model_type in causal
    return architecture in causal.values() or "AutoModelForCausalLM" in remote


def _architecture(config: Any) -> str | None:
    return next(iter(getattr(config, "architectures", None) or ()), None)


def some(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Parse a GGUF file's header and look up the names of its tensors once within the block.

    transformers does so for config, tokenizer and weights each, and for every tensor: half of the
    time that a small model takes.
    """
    _require_gguf()
    import gguf

    reader, names = lru_cache(1)(gguf.GGUFReader), lru_cache(1)(gguf.get_tensor_name_map)
    with (
        mock.patch.object(gguf, "GGUFReader", lambda path: reader(str(path))),
        mock.patch.object(gguf, "get_tensor_name_map", names),
    ):
        yield


def gguf_note(path: Path) -> str | None:
    """Say to how many bits a GGUF file rounded most of its matrix elements, or None.

    Raises CheckpointError where the file is truncated or no GGUF. The package gguf has to be there.
    """
    from gguf import GGUFReader

    elements: Counter[str] = Counter()
    try:
        for tensor in GGUFReader(path).tensors:
            if len(tensor.shape) > 1:
                elements[tensor.tensor_type.name] += int(tensor.n_elements)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or no GGUF: {_first_line(error)}") from error
    kind = max(elements, key=lambda name: elements[name], default="F32")
    bits = re.search(r"Q(\d)", kind)
    return f"weights were already rounded to {bits[1]} bits (GGUF {kind})" if bits else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what transformers and the hub print while loading off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bar = "transformers.modeling_gguf_pytorch_utils.tqdm"
    try:
        with warnings.catch_warnings(), mock.patch(bar, _track_gguf):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _track_gguf(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
    return track(tensors, "reading GGUF")
